"""Every engine on the same problems, beside the truth.

    python examples/benchmarks/engines.py [--quick] [--engines NUTS TemperedSMC] [--problems digit]

Problems, the first four with an exact posterior: `two modes`, two narrow Gaussians in 2 dimensions
and one datum (the demonstration of Feng et al. 2023); `one mode` and `many modes`, the 25-mode
mixture in 8 dimensions (see mixture_posterior.py) under 4 data and under 1; `field`, a Gaussian
field of 32 x 32 pixels, 16 of them seen (Boys et al. 2023); `digit`, a held-out digit whose upper
half is seen with a noise of two grey levels.

Measured on all draws: the sliced Wasserstein distance to as many exact draws, over its floor, that
between two exact sets; the total variation of the masses of the modes; the root of the mean square,
over the coordinates, of the errors of mean and standard deviation in posterior standard deviations;
the error of the log evidence where the engine gives one. For `digit` the truth is replaced by the
first engine named, and its floor is between the halves of that engine's draws.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import arguments, digits_flow, held_out_digits, show, with_solver, write
from mixtures import Case, sliced_wasserstein

from scoreprior import NUTS, FixedGrid, Flow, Moments, Problem, ScorePrior, TemperedSMC
from scoreprior.denoise import Gaussian

ENGINES = {
    "NUTS": NUTS(300, 250, 4),
    "TemperedSMC": TemperedSMC(250, 4),
}


class Trial(NamedTuple):
    """A problem, and of its posterior what is known.

    `sample(n, seed)` gives exact draws [n, d], `mass_error(x)` the total variation of mode masses.
    """

    problem: Problem
    sample: Callable[[int, int], np.ndarray] | None = None
    mass_error: Callable[[np.ndarray], float] = lambda _: np.nan
    log_evidence: float = np.nan


def _mixture(case: Case) -> Trial:
    posterior = mixtures.solve(case)
    return Trial(
        mixtures.problems(case.means, case.weights, case.variance)(case),
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
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[seen], 0.1).to_event(1), obs=y)

    return Trial(
        Problem.from_model(model, jnp.asarray(y, jnp.float32)),
        lambda n, seed: mean + np.random.default_rng(seed).standard_normal((n, 1024)) @ root.T,
        log_evidence=-0.5 * float(y @ np.linalg.solve(cov_y, y) + log_det),
    )


def digit() -> Trial:
    """The upper half of held-out digit 0, noise of two grey levels."""
    flow = digits_flow(jnp.float32)
    assert isinstance(flow.solver, FixedGrid)
    prior = ScorePrior(with_solver(flow, FixedGrid(6, flow.solver.time)))
    x = held_out_digits(flow, 1)[0]
    y = x[:4] + 2.0 * jax.random.normal(jax.random.key(1), (4, 8))

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[:4], 2.0).to_event(2), obs=y)

    return Trial(Problem.from_model(model, y))


TRIALS: dict[str, Callable[[], Trial]] = {
    "two modes": two_modes,
    "one mode": lambda: _mixture(mixtures.draw_case(8, 4, 1.0, 0)),
    "many modes": lambda: _mixture(mixtures.draw_case(8, 1, 0.1, 0)),
    "field": field,
    "digit": digit,
}


def run(trial: Trial, engine: Any) -> tuple[np.ndarray, float, float]:
    """Draws [n, d] of the prior site, the log evidence or NaN, and seconds with compilation."""
    start = time.perf_counter()
    draws = engine.run(trial.problem, jax.random.key(0), progress=False)
    seconds = time.perf_counter() - start
    values = jax.jit(jax.vmap(jax.vmap(draws.problem.constrain)))(draws.positions)["x"]
    log_evidence = draws.extra.get("log_evidence", ((), np.nan))[1]
    x = np.asarray(values, float)
    return x.reshape(x.shape[0] * x.shape[1], -1), float(log_evidence), seconds


def compare(x: np.ndarray, exact: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Distances of draws `x` [n, d] to those of `exact`, beside that of `other`, each [n, d]."""
    sd = exact.std(0)
    floor = sliced_wasserstein(other, exact)
    return {
        "SW over floor": sliced_wasserstein(x, exact) / floor,
        "SW floor": floor,
        "mean off by, sd": float(np.sqrt(np.mean(((x.mean(0) - exact.mean(0)) / sd) ** 2))),
        "sd off by, relative": float(np.sqrt(np.mean((x.std(0) / sd - 1) ** 2))),
    }


def halves(reference: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Draws with replacement from the first half of `reference`, half 0, or from the second."""
    half = len(reference) // 2
    parts = reference[:half], reference[half:]
    return lambda n, part: parts[part][np.random.default_rng(part).integers(half, size=n)]


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "engines")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--problems", nargs="+", default=list(TRIALS), choices=TRIALS)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    found: dict[str, dict[str, float]] = {}
    for name in options.problems[: 2 if options.quick else None]:
        trial = TRIALS[name]()
        sample = trial.sample
        for engine in options.engines:
            x, log_evidence, seconds = run(trial, ENGINES[engine])
            ours = x
            if sample is None:
                sample = halves(x)
                ours = sample(len(x), 1)
            exact, other = sample(len(x), 0), sample(len(x), 1)
            result = compare(ours, exact, other) | {
                "mass TV": trial.mass_error(x),
                "evidence off by": abs(log_evidence - trial.log_evidence),
                "draws": len(x),
                "seconds": seconds,
            }
            found[f"{name}: {engine}"] = result
            print(name, engine, {k: float(f"{v:.3g}") for k, v in result.items()}, flush=True)
    columns = list(next(iter(found.values())))
    rows = [[name, *result.values()] for name, result in found.items()]
    show("Engines", ["problem and engine", *columns], rows)
    write(options.output, found)


if __name__ == "__main__":
    main()
