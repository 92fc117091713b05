"""Guidance on posteriors of a 25-mode mixture, uncorrected and corrected, against the closed form.

    python examples/benchmarks/guided_posterior.py [--quick] [--dimension 80] [--random]

The problems of mixture_posterior.py, by 1,000 draws of `Guided` and by `FeynmanKac` with 4 groups
of 250 particles, 100 levels each. Settings of the methods are fixed in advance: `PiGDM` with the
variance within a mode, `DPS` at `zeta = 1` and `DiffPIR` at `lambda = 8` as published. Medians over
the problems of the sliced Wasserstein distance, over its floor too, of the total variation of the
masses of the modes, of the error of the log evidence, and of the largest 2-Wasserstein distance
over 100 slices. CPU, seconds per problem and method; a stopped program goes on where it was.
"""

import math
import statistics
import time
import warnings
from typing import Any

import jax
import numpy as np
from common import Progress, arguments, show, write
from mixtures import (
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

import scoreprior as sp
from scoreprior.denoise import GaussianMixture
from scoreprior.guide import DPS, JFPS, MMPS, NRLG, TMPD, DiagonalTMPD, DiffPIR, MCGDiff, PiGDM

NUM_DRAWS, NUM_STEPS = 1000, 100


def engines(moments: sp.Moments, sigma_max: float) -> dict[str, Any]:
    """Engines by name."""
    methods = {
        "TMPD": TMPD(),
        "DiagonalTMPD": DiagonalTMPD(),
        "PiGDM": PiGDM(1.0),
        "JFPS": JFPS(moments),
        "DiffPIR": DiffPIR(8.0),
        "NRLG": NRLG(),
        "MMPS": MMPS(2, num_probes=1),
        # The published step of 1 at every one of a thousand levels, as a rate.
        "DPS": DPS(1000 / (2 * math.log(sigma_max / 0.1))),
    }
    alone = {name: sp.Guided(method, NUM_DRAWS, NUM_STEPS) for name, method in methods.items()}
    corrected = {
        f"{name}, corrected": sp.FeynmanKac(method, NUM_DRAWS // 4, 4, NUM_STEPS)
        for name, method in (methods | {"MCGDiff": MCGDiff()}).items()
    }
    return corrected | alone


def measure(case: Any, problem: sp.Problem, engine: Any, seed: int) -> dict[str, float]:
    """One problem by one engine."""
    posterior = solve(case)
    exact, other = (sample(posterior, NUM_DRAWS, 2 * seed + i) for i in range(2))
    many = sample(posterior, 10 * NUM_DRAWS, 10_000 + seed)
    start = time.perf_counter()
    try:
        draws = engine.run(problem, jax.random.key(seed), progress=False)
    except FloatingPointError as error:
        print(error)
        return {"lost": 1.0}
    seconds = time.perf_counter() - start
    extra = {name: values for name, (_, values) in draws.extra.items()}
    x = np.asarray(draws.positions["x"], float).reshape(NUM_DRAWS, -1)
    lost = ~np.isfinite(x).all(1)
    result = {"lost": float(lost.mean()), "seconds": seconds}
    if lost.all():
        return result
    kept = x[~lost]
    x = kept[np.arange(NUM_DRAWS) % len(kept)]
    floor = sliced_wasserstein(other, exact)
    distance = sliced_wasserstein(x, exact)
    log_evidence = float(extra.get("log_evidence", np.nan))
    return result | {
        "SW": distance,
        "SW over floor": distance / floor,
        "SW floor": floor,
        "mass TV": mass_error(posterior, x),
        "mass TV floor": mass_error(posterior, other),
        "evidence error": abs(log_evidence - posterior.log_evidence),
        "its se": float(extra.get("log_evidence_se", np.nan)),
        "max SW": max_sliced_wasserstein(x, many),
        "max SW floor": max_sliced_wasserstein(other, many),
        "least ESS": float(extra["ess"].min()) if "ess" in extra else np.nan,
    }


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "guided_posterior")
    suite_options(parser)
    parser.add_argument("--methods", nargs="+", help="some of them")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    weights, means = suite_weights(options), grid(options.dimension)
    problem = problems(means, weights)
    law = GaussianMixture.diagonal(
        np.asarray(weights, np.float32), np.asarray(means, np.float32), 0.99
    )
    moments = law.moments()
    sigma_max = float(sp.Flow(law, moments, sigma_min=0.1).sigma_max)
    chosen = engines(moments, sigma_max)
    if options.methods:
        chosen = {name: chosen[name] for name in options.methods}
    progress = Progress(options.output)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    kinds: dict[str, list[dict[str, float]]] = {}
    for one in suite(options):
        for name, engine in chosen.items():
            result = progress(
                f"{name}: {one.num_data} / {one.sigma_y}, {one.seed}",
                (options.dimension, options.random, type(engine).__name__, NUM_STEPS),
                lambda one=one, engine=engine: measure(
                    one.case, problem(one.case), engine, one.seed
                ),
            )
            found[name].append(result)
            if name == next(iter(chosen)):
                kinds.setdefault(one.kind, []).append(result)
    columns = list(found[next(iter(chosen))][0])
    for title, groups in (("methods", found), (next(iter(chosen)), kinds)):
        rows = [
            [name, *(_summary(results, column) for column in columns), len(results)]
            for name, results in groups.items()
        ]
        show(f"{title}, d = {options.dimension}", ["", *columns, "problems"], rows)
    write(options.output, {"methods": found, "kinds": kinds})


def _summary(results: list[dict[str, float]], column: str) -> float:
    """The share of all draws that were lost, or the median where some are finite."""
    if column == "lost":
        return statistics.mean(result[column] for result in results)
    values = [result[column] for result in results if column in result]
    return statistics.median(values) if values else math.nan


if __name__ == "__main__":
    main()
