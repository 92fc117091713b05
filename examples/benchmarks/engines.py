"""Every engine on the same problems, beside the truth.

    python examples/benchmarks/engines.py [--quick] [--engines NUTS TemperedSMC] [--problems digit]

Problems, the first four with an exact posterior: `two modes`, two narrow Gaussians in 2 dimensions
and one datum (the demonstration of Feng et al. 2023); `one mode` and `many modes`, the 25-mode
mixture in 8 dimensions (see mixture_posterior.py) under 4 data and under 1; `field`, a Gaussian
field of 32 x 32 pixels, 16 of them seen (Boys et al. 2023); `digit`, a held-out digit whose upper
half is seen with a noise of two grey levels.

Measured: the sliced Wasserstein distance of 1,000 draws, evenly spaced among all, to as many exact
ones, over its floor, that between two exact sets; the total variation of the masses of the modes;
agreement of means and standard deviations with the truth in Monte-Carlo standard errors (root mean
square over coordinates, about 1 where they agree); the largest shift of a mean in posterior
standard deviations and the median ratio of standard deviations; the error of the log evidence where
the engine gives one. For `digit`, a run of NUTS with a key of its own stands for the truth.

Evaluations are those of the model, warm-up and waiting chains included: each is one solve of the
flow, or one call of the denoiser where an engine follows the score of `x`. Seconds include
compilation. CPU; a stopped program goes on where it was.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from common import Progress, arguments, digits_flow, held_out_digits, show, with_solver, write
from mixtures import Case, sliced_wasserstein

import scoreprior as sp
from scoreprior import FixedGrid, Flow, Moments, Problem, ScorePrior
from scoreprior.denoise import Gaussian
from scoreprior.guide import TMPD
from scoreprior.vi import IAF, FullRank, LowRank, MeanField, NaturalGradient

NUM_DRAWS = 1000
REFERENCE = sp.NUTS(300, 500)


class Trial(NamedTuple):
    """A problem, and of its posterior what is known.

    `sample(n, seed)` gives exact draws [n, d], `mass_error(x)` the total variation of mode masses,
    and `step` is the square of the smallest standard deviation in any direction.
    """

    problem: Problem
    step: float
    sample: Callable[[int, int], np.ndarray] | None = None
    mass_error: Callable[[np.ndarray], float] = lambda _: np.nan
    log_evidence: float = np.nan


ENGINES: dict[str, Callable[[float], Any]] = {
    "NUTS": lambda _: sp.NUTS(300, 250),
    "HMC": lambda _: sp.HMC(300, 250),
    "DynamicHMC": lambda _: sp.DynamicHMC(300, 250),
    "MALA": lambda _: sp.MALA(1000, 2000),
    "Barker": lambda _: sp.Barker(1000, 2000),
    "RandomWalk": lambda _: sp.RandomWalk(2000, 4000),
    "Slice": lambda _: sp.Slice(100, 250),
    "EllipticalSlice": lambda _: sp.EllipticalSlice(500, 1000),
    "LatentGaussian": lambda _: sp.LatentGaussian(1000, 2000),
    "ChEES": lambda _: sp.ChEES(300, 32, 32),
    "MEADS": lambda _: sp.MEADS(500, 32, 32),
    "MCLMC": lambda _: sp.MCLMC(2000, 1000),
    "AdjustedMCLMC": lambda _: sp.AdjustedMCLMC(500, 500),
    "SGLD": lambda step: sp.SGLD(1000, 4000, step_size=0.2 * step),
    "SGHMC": lambda step: sp.SGHMC(200, 500, step_size=0.1 * step**0.5),
    "SVGD": lambda step: sp.SVGD(250, 1000, step_size=3 * step**0.5),
    "PredictorCorrector": lambda _: sp.PredictorCorrector(1000),
    "AnnealedLangevin": lambda _: sp.AnnealedLangevin(1000),
    "DAPS": lambda _: sp.DAPS(1000),
    "SplitGibbs": lambda _: sp.SplitGibbs(num_samples=500),
    "TemperedSMC": lambda _: sp.TemperedSMC(250),
    "PersistentSMC": lambda _: sp.PersistentSMC(250),
    "FeynmanKac": lambda _: sp.FeynmanKac(TMPD(), 250),
    "Guided, TMPD": lambda _: sp.Guided(TMPD()),
    "NestedSampling": lambda _: sp.NestedSampling(250),
    "VI, MeanField": lambda _: sp.VI(MeanField(), 1000),
    "VI, LowRank(8)": lambda _: sp.VI(LowRank(8), 1000),
    "VI, FullRank": lambda _: sp.VI(FullRank(), 1000),
    "VI, natural": lambda _: sp.VI(FullRank(1.0), 60, optimizer=NaturalGradient()),
    "VI, IAF": lambda _: sp.VI(IAF(), 1000, optimizer=optax.adam(3e-3)),
    "Pathfinder": lambda _: sp.Pathfinder(),
    "REDDiff": lambda _: sp.REDDiff(0.25),
}
"""Engines by name, for a posterior whose smallest variance is given."""

SKIPPED = {
    "field": (
        *("RandomWalk", "Slice", "NestedSampling", "SGLD", "SGHMC", "SVGD"),
        *("VI, FullRank", "VI, natural"),
    ),
    "digit": ("RandomWalk", "Slice", "NestedSampling"),
}
"""What is hopeless there by its own documentation, or does not fit in memory."""

evaluations = 0


@jax.custom_jvp
def counted(x: jax.Array) -> jax.Array:
    """`x`, adding one to `evaluations` for every evaluation in a batch."""

    def count(first: Any) -> np.ndarray:
        global evaluations
        evaluations += int(np.size(first))
        return np.zeros(np.shape(first), np.float32)

    first = jnp.ravel(x)[0].astype(jnp.float32)
    zero = jax.pure_callback(
        count, jax.ShapeDtypeStruct((), jnp.float32), first, vmap_method="expand_dims"
    )
    return x + zero.astype(x.dtype)


@counted.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return counted(*primals), tangents[0]


def _mixture(case: Case) -> Trial:
    posterior = mixtures.solve(case)
    return Trial(
        mixtures.problems(case.means, case.weights, case.variance, counted)(case),
        float(np.linalg.svd(posterior.root)[1].min() ** 2),
        lambda n, seed: mixtures.sample(posterior, n, seed),
        lambda x: mixtures.mass_error(posterior, x),
        posterior.log_evidence,
    )


def two_modes() -> Trial:
    """Modes at +-(0.5, 0.5) with standard deviation 0.1; y = -2 x_1 + 1.7 x_2 + N(0, 0.2^2)."""
    means = np.array([[0.5, 0.5], [-0.5, -0.5]])
    A, y = np.array([[-2.0, 1.7]]), np.array([0.3])
    return _mixture(Case(np.full(2, 0.5), means, A, y, 0.2, 0.1**2))


def field() -> Trial:
    """A Matern-5/2 field on [-5, 5]^2 with 16 pixels seen, noise 0.1."""
    axis = np.linspace(-5, 5, 32)
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    r = np.sqrt(5) * np.linalg.norm(points[:, None] - points[None], axis=-1)
    clean = (1 + r + r**2 / 3) * np.exp(-r)
    covariance = clean + 1e-4 * np.eye(1024)
    rng = np.random.default_rng(0)
    seen = np.sort(rng.choice(1024, 16, replace=False))
    y = np.linalg.cholesky(covariance)[seen] @ rng.standard_normal(1024)
    y = y + 0.1 * rng.standard_normal(16)
    cov_y = covariance[np.ix_(seen, seen)] + 0.01 * np.eye(16)
    gain = np.linalg.solve(cov_y, covariance[seen]).T
    mean = gain @ y
    root = np.linalg.cholesky(covariance - gain @ covariance[seen] + 1e-9 * np.eye(1024))
    _, log_det = np.linalg.slogdet(2 * np.pi * cov_y)

    moments = Moments.dense(jnp.zeros(1024), jnp.asarray(clean, jnp.float32))
    prior = ScorePrior(Flow(Gaussian(moments), moments, sigma_min=0.01, solver=FixedGrid(1)))

    def model(y):
        x = counted(numpyro.sample("x", prior))
        numpyro.sample("y", dist.Normal(x[seen], 0.1).to_event(1), obs=y)

    return Trial(
        Problem.from_model(model, jnp.asarray(y, jnp.float32)),
        1e-4,
        lambda n, seed: mean + np.random.default_rng(seed).standard_normal((n, 1024)) @ root.T,
        log_evidence=-0.5 * float(y @ np.linalg.solve(cov_y, y) + log_det),
    )


def digit() -> Trial:
    """The upper half of held-out digit 0, noise of two grey levels."""
    flow = digits_flow(jnp.float32)
    assert isinstance(flow.solver, FixedGrid)
    prior = ScorePrior(with_solver(flow, FixedGrid(4, flow.solver.time)))
    x = held_out_digits(flow, 1)[0]
    y = x[:4] + 2.0 * jax.random.normal(jax.random.key(1), (4, 8))

    def model(y):
        x = counted(numpyro.sample("x", prior))
        numpyro.sample("y", dist.Normal(x[:4], 2.0).to_event(2), obs=y)

    return Trial(Problem.from_model(model, y), float(flow.sigma_min**2))


TRIALS: dict[str, Callable[[], Trial]] = {
    "two modes": two_modes,
    "one mode": lambda: _mixture(mixtures.draw_case(8, 4, 1.0, 0)),
    "many modes": lambda: _mixture(mixtures.draw_case(8, 1, 0.1, 0)),
    "field": field,
    "digit": digit,
}


def exact_tree(x: np.ndarray, like: Any) -> Any:
    """Exact draws [n, d] in a tree that `sp.compare` takes beside `like`."""
    shape = like["posterior"]["x"].shape[2:]
    groups: dict[str, Any] = {"posterior": {"x": x.reshape(1, len(x), *shape)}}
    groups["sample_stats"] = {"exact": np.ones((1, len(x)))}
    if "observed_data" in like.children:
        data = like["observed_data"].data_vars.items()
        groups["observed_data"] = {name: np.asarray(value) for name, value in data}
    return az.from_dict(groups)


def cost_of(engine: Any, tree: Any, calls: int) -> int:
    """Evaluations of a run that called the model `calls` times.

    Samplers along noise levels read the model seldom, and otherwise call the denoiser alone.
    """
    if isinstance(engine, sp.PredictorCorrector | sp.AnnealedLangevin):
        return engine.num_samples * (engine.num_levels - 1) * (1 + engine.num_corrector_steps)
    if isinstance(engine, sp.SplitGibbs):
        sweeps = engine.num_warmup + engine.num_samples
        return engine.num_chains * sweeps * engine.num_steps
    if isinstance(engine, sp.FeynmanKac):
        return engine.num_groups * engine.num_particles * engine.num_steps
    if isinstance(engine, sp.Guided | sp.DAPS):
        return engine.num_samples * int(tree["sample_stats"]["num_evaluations"])
    return calls


def draws(tree: Any, num_draws: int = NUM_DRAWS) -> np.ndarray:
    """At most `num_draws` rows [n, d] of the prior site, evenly spaced."""
    x = np.asarray(tree["posterior"]["x"], float)
    x = x.reshape(x.shape[0] * x.shape[1], -1)
    return x[np.linspace(0, len(x) - 1, min(num_draws, len(x))).astype(int)]


def measure(trial: Trial, engine: Any, reference: Any | None) -> dict[str, float]:
    """Distances and cost of `engine` on `trial`; `reference` stands for the truth if unknown."""
    before = evaluations
    tree = sp.infer(trial.problem, engine, key=jax.random.key(0), progress=False)
    cost = cost_of(engine, tree, evaluations - before)
    x = draws(tree)
    if reference is None:
        assert trial.sample is not None
        truth = exact_tree(trial.sample(20 * NUM_DRAWS, 2), tree)
        exact, other = (trial.sample(len(x), seed) for seed in range(2))
    else:
        truth = reference
        half = len(draws(truth)) // 2
        parts = np.random.default_rng(0).permutation(draws(truth))
        exact, other, x = parts[:half], parts[half:], draws(tree, half)
    floor = sliced_wasserstein(other, exact)
    row = sp.compare(truth, tree).iloc[1]
    stats = tree["sample_stats"].to_dataset()
    log_evidence = float(stats["log_evidence"]) if "log_evidence" in stats else np.nan
    return {
        "SW over floor": sliced_wasserstein(x, exact) / floor,
        "mass TV": trial.mass_error(draws(tree)),
        "means off by, se": row["mean_z_rms"],
        "sds off by, se": row["sd_z_rms"],
        "largest shift, sd": row["mean_shift"],
        "sd ratio": row["sd_ratio"],
        "evidence off by": abs(log_evidence - trial.log_evidence),
        "log evidence": log_evidence,
        "least ESS": row["min_ess"],
        "thousand evaluations": cost / 1e3,
        "seconds": row["seconds"],
    }


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "engines")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--problems", nargs="+", default=list(TRIALS), choices=TRIALS)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    progress = Progress(options.output)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.problems[: 1 if options.quick else None]:
        trial = TRIALS[name]()
        reference = None
        if trial.sample is None:
            reference = sp.infer(trial.problem, REFERENCE, key=jax.random.key(1), progress=False)
        found[name] = {}
        for label in options.engines:
            if label in SKIPPED.get(name, ()):
                continue
            engine = ENGINES[label](trial.step)
            found[name][label] = progress(
                f"{name}, {label}",
                engine,
                lambda trial=trial, engine=engine, reference=reference: measure(
                    trial, engine, reference
                ),
            )
            jax.clear_caches()
        columns = list(next(iter(found[name].values())))
        rows = [[label, *result.values()] for label, result in found[name].items()]
        show(name, ["engine", *columns], rows)
    write(options.output, found)


if __name__ == "__main__":
    main()
