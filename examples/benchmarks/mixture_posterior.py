"""Posteriors of a 25-mode mixture by `TemperedSMC`, against the closed form.

    python examples/benchmarks/mixture_posterior.py [--quick] [--dimension 80]

The prior is a mixture of 25 Gaussians of unit covariance and equal weights on a grid of spacing 8,
repeated along the coordinates (Boys et al. 2023, "Tweedie moment projected diffusions"); the data
are `d_y` = 1, 2 or 4 numbers `y = A x + N(0, sigma_y^2 I)` with `A = U diag(s) V'`, `s` sorted
uniforms, and `sigma_y` = 0.01, 0.1 or 1. Posterior and evidence are exact.

Measured on 1,000 draws: the sliced Wasserstein distance (mean over 1,000 slices) to 1,000 exact
draws, beside that between two exact sets, the floor; the total variation of the masses of the
modes; the error of the log evidence; and its own standard error. Medians over the problems, 8 of
each of the nine kinds or, with --quick, one. CPU, about a minute per problem.
"""

import itertools
import statistics
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import arguments, show, write

from scoreprior import FixedGrid, Flow, Problem, ScorePrior, TemperedSMC
from scoreprior.denoise import GaussianMixture
from scoreprior.flow import ArctanTime

SIGMA_MIN = 0.1
NUM_DRAWS, NUM_SLICES = 1000, 1000


class Case(NamedTuple):
    """One problem."""

    A: jax.Array
    y: jax.Array
    sigma_y: jax.Array


def mixture(size: int, variance: float) -> GaussianMixture:
    """25 components with means on a grid, tiled along `size` coordinates."""
    grid = jnp.array([(-8.0 * i, -8.0 * j) for i in range(-2, 3) for j in range(-2, 3)])
    return GaussianMixture.diagonal(jnp.full(25, 1 / 25), jnp.tile(grid, size // 2), variance)


def draw_case(law: GaussianMixture, num_data: int, sigma_y: float, seed: int) -> Case:
    """A random operator, and data simulated with it."""
    rng = np.random.default_rng(seed)
    size = law.components.mean.shape[-1]
    u, _, v = np.linalg.svd(rng.standard_normal((num_data, size)), full_matrices=False)
    A = u @ np.diag(np.sort(rng.uniform(size=num_data))[::-1]) @ v
    x = np.asarray(law.sample(jax.random.key(seed)))
    y = A @ x + sigma_y * rng.standard_normal(num_data)
    return Case(*(jnp.asarray(value, jnp.float32) for value in (A, y, sigma_y)))


def _model(prior: ScorePrior, case: Case) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(case.A @ x, case.sigma_y).to_event(1), obs=case.y)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over random directions of the 1-D Wasserstein distance of two sets [n, size]."""
    slices = np.random.default_rng(0).standard_normal((a.shape[1], NUM_SLICES))
    slices /= np.linalg.norm(slices, axis=0)
    return float(np.abs(np.sort(a @ slices, 0) - np.sort(b @ slices, 0)).mean())


def masses(law: GaussianMixture, x: np.ndarray) -> np.ndarray:
    """Share of the draws [n, size] that falls to each component."""
    return np.exp(jax.vmap(law.log_responsibilities)(x)).mean(0)


def likely(law: GaussianMixture, case: Case) -> GaussianMixture:
    """`law` without the components whose posterior mass is below the smallest number."""
    A, y, means = (np.asarray(leaf, float) for leaf in (case.A, case.y, law.components.mean))
    covariance = A @ A.T + float(case.sigma_y) ** 2 * np.eye(len(A))
    residuals = y - means @ A.T
    log_mass = -0.5 * np.einsum("ki,ij,kj->k", residuals, np.linalg.inv(covariance), residuals)
    kept = means[log_mass > log_mass.max() - 300]
    return GaussianMixture.diagonal(jnp.full(len(kept), 1 / len(kept)), jnp.asarray(kept), 1.0)


def exact_posterior(law: GaussianMixture, case: Case, key: jax.Array) -> tuple[Any, float, Any]:
    """The posterior, the log evidence and two sets of exact draws, in double precision."""
    with jax.enable_x64(True):
        law = likely(law, case)
        A, y = (jnp.asarray(np.asarray(leaf), float) for leaf in (case.A, case.y))
        cov_y = float(case.sigma_y) ** 2 * jnp.eye(len(y))
        posterior = law.posterior(A, y, cov_y)
        keys = jax.random.split(key, (2, NUM_DRAWS))
        sets = np.asarray(jax.vmap(jax.vmap(posterior.sample))(keys))
        log_evidence = float(law.log_evidence(A, y, cov_y)) + np.log(len(law.weights) / 25)
        return posterior, log_evidence, sets


def measure(
    law: GaussianMixture, prior: ScorePrior, case: Case, engine: TemperedSMC, seed: int
) -> dict[str, float]:
    """One problem: errors beside those of exact draws, cost, and what the engine says of itself."""
    posterior, log_evidence, (exact, other) = exact_posterior(law, case, jax.random.key(100 + seed))
    problem = Problem.from_model(_model, prior, case)
    start = time.perf_counter()
    draws = engine.run(problem, jax.random.key(seed), progress=False)
    seconds = time.perf_counter() - start
    x = np.asarray(jax.jit(jax.vmap(jax.vmap(problem.constrain)))(draws.positions)["x"])
    x = x.reshape(-1, x.shape[-1])
    extra = {name: values for name, (_, values) in draws.extra.items()}
    with jax.enable_x64(True):
        found, best = masses(posterior, np.asarray(x, float)), masses(posterior, other)
    weights = np.asarray(posterior.weights)
    moves, steps = extra["num_moves"].sum(1).mean(), extra["temperature"].shape[1]
    solves = engine.kernel.cost * moves + 2 * steps + 1
    per_solve = prior.flow.solver.num_steps * len(prior.flow.solver.method.nodes)
    return {
        "SW": sliced_wasserstein(x, exact),
        "SW floor": sliced_wasserstein(other, exact),
        "mass TV": float(0.5 * np.abs(found - weights).sum()),
        "mass TV floor": float(0.5 * np.abs(best - weights).sum()),
        "evidence error": abs(float(extra["log_evidence"]) - log_evidence),
        "its se": float(extra["log_evidence_se"]),
        "temperatures": steps,
        "moves": float(moves),
        "ancestors": int(extra["unique_ancestors"][:, -1].min()),
        "flow solves per particle": solves,
        "million denoiser evaluations": solves * per_solve * NUM_DRAWS / 1e6,
        "seconds": seconds,
    }


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "mixture_posterior")
    parser.add_argument("--dimension", type=int, default=8, help="an even number")
    parser.add_argument("--groups", type=int, default=4, help="groups that share 1,000 particles")
    parser.add_argument("--repeats", type=int, default=8, help="problems of every kind")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    law = mixture(options.dimension, 1.0)
    clean = mixture(options.dimension, 1 - SIGMA_MIN**2)
    # Steps are spent where modes separate, at half their distance: errors of 0.003 (median).
    solver = FixedGrid(12, ArctanTime(4.0))
    prior = ScorePrior(Flow(clean, clean.moments(), sigma_min=SIGMA_MIN, solver=solver))
    engine = TemperedSMC(NUM_DRAWS // options.groups, options.groups)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(1 if options.quick else options.repeats):
        for num_data, sigma_y in itertools.product((1, 2, 4), (0.01, 0.1, 1.0)):
            case = draw_case(law, num_data, sigma_y, seed)
            result = measure(law, prior, case, engine, seed)
            found.setdefault(f"{num_data} / {sigma_y:g}", []).append(result)
            print(num_data, sigma_y, seed, {k: float(f"{v:.3g}") for k, v in result.items()})
    found["all"] = [result for results in found.values() for result in results]
    columns = list(found["all"][0])
    rows = [
        [name, *(statistics.median(result[column] for result in results) for column in columns)]
        for name, results in found.items()
    ]
    ratio = rows[-1][1] / rows[-1][2]
    title = f"Medians, d = {options.dimension}; sliced Wasserstein over its floor: {ratio:.3g}"
    show(title, ["data / noise", *columns], rows)
    write(options.output, found)


if __name__ == "__main__":
    main()
