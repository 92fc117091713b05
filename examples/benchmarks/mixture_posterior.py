"""Posteriors of a 25-mode mixture by `TemperedSMC`, against the closed form.

    python examples/benchmarks/mixture_posterior.py [--quick] [--dimension 80] [--random]

The prior is a mixture of 25 Gaussians of unit covariance on a grid of spacing 8, repeated along
the coordinates; the data are `d_y` = 1, 2 or 4 numbers `y = A x + N(0, sigma_y^2 I)` with
`A = U diag(s) V'`, `s` sorted uniforms. Weights are equal and `sigma_y` = 0.01, 0.1 or 1 (Boys et
al. 2023, "Tweedie moment projected diffusions"); with --random, weights are squares of normals and
`sigma_y` is uniform up to the largest `s` (Cardoso et al. 2023, "Monte Carlo guided diffusion").

Measured on 1,000 draws: the sliced Wasserstein distance (mean over 1,000 slices) to 1,000 exact
draws, beside that between two exact sets, the floor; the total variation of the masses of the
modes; the error of the log evidence; its own standard error; and the largest 2-Wasserstein distance
over 100 slices to 10,000 exact draws. Medians over the problems. CPU, about a minute per problem;
a stopped program goes on where it was.
"""

import statistics
import time
import warnings

import jax
import numpy as np
from common import Progress, arguments, show, write
from mixtures import (
    Case,
    grid,
    mass_error,
    max_sliced_wasserstein,
    problems,
    sample,
    sliced_wasserstein,
    solve,
    suite,
    suite_options,
    suite_weights,
)

from scoreprior import Problem, TemperedSMC
from scoreprior.smc import HMCMoves

NUM_DRAWS = 1000


def measure(case: Case, problem: Problem, engine: TemperedSMC, seed: int) -> dict[str, float]:
    """One problem: errors beside those of exact draws, cost, and what the engine says of itself."""
    posterior = solve(case)
    exact, other = (sample(posterior, NUM_DRAWS, 2 * seed + i) for i in range(2))
    many = sample(posterior, 10 * NUM_DRAWS, 10_000 + seed)
    start = time.perf_counter()
    draws = engine.run(problem, jax.random.key(seed), progress=False)
    seconds = time.perf_counter() - start
    x = np.asarray(jax.jit(jax.vmap(jax.vmap(problem.constrain)))(draws.positions)["x"], float)
    x = x.reshape(-1, x.shape[-1])
    extra = {name: values for name, (_, values) in draws.extra.items()}
    moves, steps = extra["num_moves"].sum(1).mean(), extra["temperature"].shape[1]
    solves = engine.kernel.cost * moves + 2 * steps + 1
    return {
        "SW": sliced_wasserstein(x, exact),
        "SW floor": sliced_wasserstein(other, exact),
        "mass TV": mass_error(posterior, x),
        "mass TV floor": mass_error(posterior, other),
        "evidence error": abs(float(extra["log_evidence"]) - posterior.log_evidence),
        "its se": float(extra["log_evidence_se"]),
        "max SW": max_sliced_wasserstein(x, many),
        "max SW floor": max_sliced_wasserstein(other, many),
        "temperatures": steps,
        "moves": float(moves),
        "ancestors": int(extra["unique_ancestors"][:, -1].min()),
        "million denoiser evaluations": solves * 36 * NUM_DRAWS / 1e6,
        "seconds": seconds,
    }


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "mixture_posterior")
    suite_options(parser)
    parser.add_argument("--groups", type=int, default=4, help="groups that share 1,000 particles")
    parser.add_argument("--target-ess", type=float, default=0.9)
    parser.add_argument("--max-moves", type=int, default=50)
    parser.add_argument("--max-autocorrelation", type=float, default=0.5)
    parser.add_argument("--leapfrog", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    problem = problems(grid(options.dimension), suite_weights(options))
    engine = TemperedSMC(
        NUM_DRAWS // options.groups,
        options.groups,
        kernel=HMCMoves(options.leapfrog),
        target_ess=options.target_ess,
        max_moves=options.max_moves,
        max_autocorrelation=options.max_autocorrelation,
        batch_size=None if options.dimension < 500 else 50,
    )
    progress = Progress(options.output)
    found: dict[str, list[dict[str, float]]] = {}
    for one in suite(options):
        result = progress(
            f"{one.kind}, {one.seed}",
            (options.dimension, options.random, engine),
            lambda one=one: measure(one.case, problem(one.case), engine, one.seed),
        )
        found.setdefault(one.kind, []).append(result)
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
