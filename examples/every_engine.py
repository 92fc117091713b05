"""One posterior by every engine, each checked against the closed form.

    python examples/every_engine.py NUTS
    python examples/every_engine.py            # all of them, in ten minutes or so

A signal of eight pixels, seen through a blur with noise. The prior is a mixture of three shapes
whose exact denoiser stands in for a trained network, so the posterior and the evidence are known.
Engines that are exact must give means and standard deviations within five Monte-Carlo standard
errors of the truth, and the evidence where they have it. The others must be as close as their entry
says, in posterior standard deviations: that is what they lose here.
"""

import argparse
import time
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreprior as sp
from scoreprior.denoise import GaussianMixture
from scoreprior.vi import IAF, FullRank, LowRank, MeanField, NaturalGradient

SIZE, SIGMA_MIN, SPREAD, NOISE = 8, 0.1, 0.5, 0.3


class Entry(NamedTuple):
    """An engine; of an approximate one, how far means and log standard deviations may be off."""

    engine: Any
    mean: float | None = None
    log_sd: float | None = None


ENGINES = {
    # Markov chains.
    "NUTS": Entry(sp.NUTS(500, 1000)),
    "HMC": Entry(sp.HMC(500, 1000)),
    "DynamicHMC": Entry(sp.DynamicHMC(500, 1000)),
    "MALA": Entry(sp.MALA(1000, 4000)),
    "Barker": Entry(sp.Barker(1000, 4000)),
    "RandomWalk": Entry(sp.RandomWalk(2000, 10_000)),
    "Slice": Entry(sp.Slice(200, 1000)),
    "EllipticalSlice": Entry(sp.EllipticalSlice(500, 4000)),
    "LatentGaussian": Entry(sp.LatentGaussian(1000, 4000)),
    "ChEES": Entry(sp.ChEES(300, 100)),
    "MEADS": Entry(sp.MEADS(500, 100)),
    "SplitGibbs": Entry(sp.SplitGibbs(num_samples=3000, num_chains=20)),
    "AdjustedMCLMC": Entry(sp.AdjustedMCLMC(500, 1000)),
    # Clouds of particles.
    "TemperedSMC": Entry(sp.TemperedSMC(500, 8)),
    "PersistentSMC": Entry(sp.PersistentSMC(500, 8)),
    "NestedSampling": Entry(sp.NestedSampling(250, 8)),
    "FeynmanKac": Entry(sp.FeynmanKac(num_particles=500, num_groups=8)),
    # No accept step: biased by the size of the steps.
    "MCLMC": Entry(sp.MCLMC(2000, 2000), 0.1, 0.05),
    "SGLD": Entry(sp.SGLD(1000, 10_000, step_size=0.005), 0.2, 0.15),
    "SGHMC": Entry(sp.SGHMC(200, 2000, step_size=0.02), 0.2, 0.15),
    "SVGD": Entry(sp.SVGD(250, 1000, step_size=0.3), 0.1, 0.35),
    # Along noise levels, with an approximate likelihood.
    "PredictorCorrector": Entry(sp.PredictorCorrector(2000), 0.1, 0.1),
    "AnnealedLangevin": Entry(sp.AnnealedLangevin(2000), 0.1, 0.1),
    "Guided": Entry(sp.Guided(sp.guide.TMPD(), 2000), 0.1, 0.1),
    "SplitGibbs, smoothed": Entry(sp.SplitGibbs(0.3, num_samples=500, num_chains=20), 0.2, 0.1),
    "DAPS": Entry(sp.DAPS(2000), 0.2, 0.4),
    # Guides.
    "MeanField": Entry(sp.VI(MeanField(), 1000), 0.15, 0.2),
    "LowRank": Entry(sp.VI(LowRank(4), 1000), 0.15, 0.15),
    "FullRank": Entry(sp.VI(FullRank(), 1000), 0.15, 0.15),
    "NaturalGradient": Entry(sp.VI(FullRank(1.0), 60, optimizer=NaturalGradient()), 0.15, 0.15),
    "IAF": Entry(sp.VI(IAF(), 1000), 0.15, 0.15),
    "Pathfinder": Entry(sp.Pathfinder(), 0.2, 0.15),
    "REDDiff": Entry(sp.REDDiff(0.25), 0.6),
}


def shapes(variance: float) -> GaussianMixture:
    """A bump to the left, a bump in the middle, or a slope, with independent variations."""
    grid = jnp.arange(SIZE, dtype=jnp.float32)
    bumps = [jnp.exp(-0.5 * (grid - centre) ** 2) for centre in (2.0, 4.0)]
    return GaussianMixture.diagonal(
        jnp.array([0.3, 0.3, 0.4]), jnp.stack([*bumps, grid / SIZE]), variance
    )


def blur() -> jax.Array:
    """Means over three neighbours, at every second pixel [SIZE / 2, SIZE]."""
    distance = jnp.abs(jnp.arange(0, SIZE, 2)[:, None] - jnp.arange(SIZE)[None])
    return (distance <= 1) / jnp.sum(distance <= 1, 1, keepdims=True)


def problem() -> tuple[sp.Problem, np.ndarray, np.ndarray, float]:
    """The problem, and of its posterior the mean [SIZE], the covariance and the log evidence."""
    clean = shapes(SPREAD**2 - SIGMA_MIN**2)
    flow = sp.Flow(clean, clean.moments(), sigma_min=SIGMA_MIN, solver=sp.Multistep(12))
    prior = sp.ScorePrior(flow)

    def model(y: jax.Array) -> None:
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(blur() @ x, NOISE).to_event(1), obs=y)

    y = blur() @ prior.sample(jax.random.key(1)) + NOISE * jax.random.normal(
        jax.random.key(2), (SIZE // 2,)
    )
    # The prior is the law of clean data with noise of sigma_min.
    truth = shapes(SPREAD**2)
    observation = blur(), y, NOISE**2 * jnp.eye(SIZE // 2)
    moments = truth.posterior(*observation).moments()
    return (
        sp.Problem.from_model(model, y),
        np.asarray(moments.mean),
        np.asarray(moments.covariance()),
        float(truth.log_evidence(*observation)),
    )


def check(entry: Entry, tree: Any, mean: np.ndarray, sd: np.ndarray, log_evidence: float) -> str:
    """What was found, after a check that it is as near to the truth as it should be."""
    draws, stats = tree["posterior"]["x"], tree["sample_stats"].to_dataset()
    found_mean, found_sd = draws.mean(("chain", "draw")).values, draws.std(("chain", "draw")).values
    shift, ratio = np.abs(found_mean - mean) / sd, np.abs(np.log(found_sd / sd))
    if entry.mean is None:
        for name, off in (("mean", found_mean - mean), ("sd", found_sd - sd)):
            z = np.abs(off / az.mcse(draws, method=name).values)
            assert np.all(z < 5), f"{name} is off by {z.max():.1f} standard errors"
        said = f"exact: mean within {shift.max():.3f} sd, sd within {ratio.max():.1%}"
        if "log_evidence" in stats:
            value, se = float(stats["log_evidence"]), float(stats["log_evidence_se"])
            assert abs(value - log_evidence) < 5 * se, f"evidence {value} +- {se}, {log_evidence}"
            said += f", log evidence {value:.3f} +- {se:.3f} (truth {log_evidence:.3f})"
        return said
    assert shift.max() < entry.mean, f"the mean is off by {shift.max():.2f} sd"
    if entry.log_sd is None:
        return f"a point {shift.max():.2f} sd from the mean"
    assert ratio.max() < entry.log_sd, f"the sd is off by {ratio.max():.0%}"
    return f"approximate: mean within {shift.max():.3f} sd, sd within {ratio.max():.1%}"


def main() -> None:
    """Run the engines that are named and check each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(ENGINES))
    names = parser.parse_args().engines or list(ENGINES)
    if unknown := sorted(set(names) - set(ENGINES)):
        parser.error(f"no engine {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    posed, mean, covariance, log_evidence = problem()
    sd = np.sqrt(np.diag(covariance))
    for name in names:
        start = time.perf_counter()
        tree = sp.infer(posed, ENGINES[name].engine, key=jax.random.key(3), progress=False)
        seconds = time.perf_counter() - start
        said = check(ENGINES[name], tree, mean, sd, log_evidence)
        print(f"{name:20}{seconds:5.0f} s   {said}", flush=True)
    print("all within their bounds")


if __name__ == "__main__":
    main()
