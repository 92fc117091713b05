"""Probabilities of rare events of a mixture by `FeynmanKac`, against the exact ones.

    python examples/benchmarks/rare_events.py [--quick] [--threshold 0.5] [--sigma-max 20]

The first coordinate of a two-dimensional mixture of seven correlated modes exceeds 7, 8, 9 or 10,
of probability 7e-3 to 1e-5. `FeynmanKac` with guidance `Exceeds`, 1,000 particles per group, 32
groups as independent runs, by 100 and 200 steps and without resampling; beside it the same
particles without guidance, which is plain Monte Carlo from the prior. Mean over the groups of the
estimated over the exact probability with its standard error, the coefficient of variation of single
groups, least and median ancestors left, and seconds for all groups, compilation included. CPU,
double precision, two minutes; a stopped program goes on where it was.
"""

import math
import time
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from common import Progress, arguments, show, write
from scipy.stats import norm

import scoreprior as sp
from scoreprior.denoise import GaussianMixture
from scoreprior.guide import Exceeds

SIGMA_MIN, NUM_PARTICLES = 0.01, 1000
WEIGHTS = np.array([0.10, 0.18, 0.14, 0.22, 0.10, 0.16, 0.10])
MEANS = np.array([[-6, -2], [-4, 4], [-1, -5], [-10, 3], [4, 3], [4, -3], [5, 0]], float)
COVARIANCES = np.array(
    [
        [[0.36, 0.30], [0.30, 0.81]],
        [[0.81, -0.25], [-0.25, 0.49]],
        [[0.49, 0.20], [0.20, 0.81]],
        [[0.04, 0.04], [0.04, 0.09]],
        [[2.40, 1.85], [1.85, 2.00]],
        [[2.40, -1.85], [-1.85, 2.00]],
        [[0.30, 0.00], [0.00, 0.30]],
    ]
)
COLUMNS = [
    "mean / exact",
    "its se",
    "CV of a run",
    "runs at zero",
    "ancestors",
    "median",
    "seconds",
]


def exact(bound: float) -> float:
    """Probability of the event under the density at `SIGMA_MIN`."""
    spreads = np.sqrt(COVARIANCES[:, 0, 0] + SIGMA_MIN**2)
    return float(WEIGHTS @ norm.sf((bound - MEANS[:, 0]) / spreads))


def first(x: jax.Array) -> jax.Array:
    """The coordinate that exceeds."""
    return x[0]


def measure(problem: sp.Problem, bound: float, engine: sp.FeynmanKac) -> dict[str, Any]:
    """One run of all groups."""
    start = time.perf_counter()
    try:
        draws = engine.run(problem, jax.random.key(0), progress=False)
    except FloatingPointError:  # no particle of any group is in the event
        nothing = {"its se": math.nan, "CV of a run": math.nan, "ancestors": 0, "median": 0}
        seconds = time.perf_counter() - start
        runs = engine.num_groups
        return {"mean / exact": 0.0, **nothing, "runs at zero": runs, "seconds": seconds}
    seconds = time.perf_counter() - start
    extra = {name: np.asarray(values) for name, (_, values) in draws.extra.items()}
    ratios = np.exp(extra["group_log_evidence"]) / exact(bound)
    ancestors = extra["unique_ancestors"][:, -1]
    deviation = ratios.std(ddof=1)
    return {
        "mean / exact": float(ratios.mean()),
        "its se": float(deviation / math.sqrt(len(ratios))),
        "CV of a run": float(deviation / ratios.mean()),
        "runs at zero": int((ratios == 0).sum()),
        "ancestors": int(ancestors.min()),
        "median": int(np.median(ancestors)),
        "seconds": seconds,
    }


def main() -> None:
    """Measure, print and write."""
    jax.config.update("jax_enable_x64", True)
    parser = arguments(__doc__, "rare_events")
    parser.add_argument("--sigma-max", type=float, help="default 10 times the largest sd")
    parser.add_argument("--threshold", type=float, default=0.0, help="of resampling (default 0)")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--bounds", type=float, nargs="+", default=[7.0, 8.0, 9.0, 10.0])
    parser.add_argument("--groups", type=int, default=32)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    law = GaussianMixture.full(WEIGHTS, MEANS, COVARIANCES)
    flow = sp.Flow(law, law.moments(), sigma_min=SIGMA_MIN, sigma_max=options.sigma_max)
    prior, progress, rows = sp.ScorePrior(flow), Progress(options.output), []

    def model(bound: jax.Array) -> None:
        x = numpyro.sample("x", prior)
        numpyro.factor("event", jnp.where(first(x) > bound, 0.0, -jnp.inf))

    steps = options.steps[:1] if options.quick else options.steps
    groups = 8 if options.quick else options.groups
    family = sp.Problem.from_model(model, jnp.asarray(options.bounds[0]))
    for bound in options.bounds:
        problem = family.with_data(jnp.asarray(bound))
        for guided, num_steps in [*((True, n) for n in steps), (False, steps[0])]:
            guidance = Exceeds(first, bound) if guided else None
            engine = sp.FeynmanKac(
                guidance, NUM_PARTICLES, groups, num_steps, threshold=options.threshold
            )
            name = "Exceeds" if guided else "none"
            result = progress(
                f"{name} {bound:g}, {num_steps} steps",
                (groups, options.threshold, flow.sigma_max),
                partial(measure, problem, bound, engine),
            )
            row = [f"{bound:g}", exact(bound), name, num_steps]
            rows.append([*row, *(result[column] for column in COLUMNS)])
    settings = f"sigma_max {flow.sigma_max:.3g}, threshold {options.threshold:g}, {groups} runs"
    columns = ["bound", "exact", "guidance", "steps", *COLUMNS]
    show(f"Rare events, {settings}", columns, rows)
    write(options.output, {"settings": settings, "columns": columns, "rows": rows})


if __name__ == "__main__":
    main()
