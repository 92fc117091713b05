"""Effective samples per second of NUTS when inpainting a digit, by the form of the posterior.

    python examples/benchmarks/nuts.py [--quick]

The upper half of a held-out digit is seen with noise of some grey levels, the lower half is hidden.
One engine, `NUTS`, non-centred, centred with the exact flow density and its gradient, and, where
asked for, centred with the score as gradient; medians of several runs. The bulk effective sample
size is that of the worst pixel. Time is that of the draws alone, without compilation and warm-up:
gradients taken, chains advancing in lock step, times the median time of one compiled gradient of
all chains, measured by turns for all forms before every run.

The centred forms are so slow that they get one chain, in trees of at most 31 gradients. A chain
that has not mixed *over*-estimates its effective sample size, so the ratios are low rather than
high. CPU, about an hour.
"""

import statistics
import time
import warnings
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import arguments, digits_flow, median_seconds, show, write

from scoreprior import NUTS, FlowDensity, Problem, ScoreGradient, ScorePrior
from scoreprior.io import load_images


class Form(NamedTuple):
    """A way to run the engine."""

    engine: NUTS
    problem: Problem


def _model(prior: ScorePrior, noise: float, y: jax.Array | None = None) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[:4], noise).to_event(2), obs=y)


def forms(quick: bool, sigma: float | None, noise: float) -> dict[str, Form]:
    """The forms compared."""
    flow = digits_flow(jnp.float32)
    truth = np.asarray(load_images("digits"))[0] + 0.5
    seen = truth[:4] + noise * np.random.default_rng(0).standard_normal((4, 8))
    y = jnp.asarray(seen, jnp.float32)
    exact = Problem.from_model(_model, ScorePrior(flow), noise, y=y)
    free = NUTS(*((50, 50, 4) if quick else (200, 150, 4)))
    few = (10, 10, 1) if quick else (150, 250, 1)
    centred = NUTS(*few, centred=True, max_tree_depth=5)
    found = {
        "non-centred": Form(free, exact),
        "centred, exact density and gradient": Form(centred, exact.centred()),
    }
    if sigma is not None:
        score = ScorePrior(flow, FlowDensity(gradient=ScoreGradient(sigma)))
        problem = Problem.from_model(_model, score, noise, y=y).centred()
        found[f"centred, ScoreGradient({sigma:g})"] = Form(centred, problem)
    return found


def gradients(every: dict[str, Form]) -> dict[str, Any]:
    """For each form, a call that computes value and gradient of all chains at prior draws."""

    def call(form: Form) -> Any:
        keys = jax.random.split(jax.random.key(3), form.engine.num_chains)
        positions = jax.vmap(form.problem.initial)(keys)
        gradient = jax.jit(jax.vmap(jax.value_and_grad(form.problem.log_density)))
        return lambda: gradient(positions)

    return {name: call(form) for name, form in every.items()}


def run(form: Form, key: jax.Array, seconds: float) -> dict[str, float]:
    """Draws of one form: effective sample size, gradients, acceptance."""
    start = time.perf_counter()
    draws = form.engine.run(form.problem, key, progress=False)
    wall = time.perf_counter() - start
    images = jax.vmap(jax.vmap(draws.problem.constrain))(draws.positions)["x"]
    ess = az.ess(az.from_dict({"posterior": {"x": np.asarray(images)}}))["x"]
    steps = np.asarray(draws.stats["n_steps"])  # [chain, draw]
    return {
        "draws": steps.size,
        "ess": float(ess.min()),
        "gradients per draw": float(steps.mean()),
        "gradient seconds": seconds,
        "acceptance": float(draws.stats["acceptance_rate"].mean()),
        "divergences": int(draws.stats["diverging"].sum()),
        "wall seconds, with compilation and warm-up": wall,
        "ESS per second": float(ess.min()) / (int(steps.max(0).sum()) * seconds),
    }


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "nuts")
    parser.add_argument("--sigma", type=float, help="level of the ScoreGradient")
    parser.add_argument("--noise", type=float, default=1.0, help="noise level, grey levels")
    parser.add_argument("--runs", type=int, default=3, help="runs of every form")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    every = forms(options.quick, options.sigma, options.noise)
    calls = gradients(every)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in every}
    for index in range(options.runs):
        seconds = {name: median_seconds(call, 5) for name, call in calls.items()}
        for name, form in every.items():
            runs[name].append(run(form, jax.random.key(1 + index), seconds[name]))
            print(name, runs[name][-1], flush=True)
    median = {
        name: {key: statistics.median(found[key] for found in many) for key in many[0]}
        for name, many in runs.items()
    }
    best = median["non-centred"]["ESS per second"]
    columns = ["draws", "ess", "gradients per draw", "gradient seconds", "acceptance"]
    columns = [*columns, "ESS per second"]
    rows = [
        [name, *(found[c] for c in columns), best / found["ESS per second"]]
        for name, found in median.items()
    ]
    show("Inpainting a digit", ["", *columns, "non-centred over this"], rows)
    write(options.output, runs)


if __name__ == "__main__":
    main()
