"""Effective samples per second of NUTS when inpainting a digit, by the form of the posterior.

    python examples/benchmarks/nuts.py [--quick]

The upper half of a held-out digit is seen with noise of one grey level, the lower half is hidden.
One engine, `NUTS`, non-centred, centred with the exact flow density and its gradient, and centred
with the score as gradient. The bulk effective sample size is that of the worst pixel. Time is that
of the draws alone, without compilation and warm-up: gradients taken, chains advancing in lock step,
times the median time of one compiled gradient of all chains, measured by turns for all forms.

The centred forms are so slow that they get few draws, in trees of at most 31 gradients; a short
chain that has not mixed *over*-estimates its effective sample size, so the ratios are low rather
than high. CPU, about half an hour.
"""

import time
import warnings
from dataclasses import dataclass
from typing import Any

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import arguments, digits_flow, median_seconds, show, write

from scoreprior import NUTS, FlowDensity, Problem, ScoreGradient, ScorePrior
from scoreprior.io import load_images

NOISE = 1.0


@dataclass
class Form:
    """A way to run the engine."""

    prior: ScorePrior
    engine: NUTS

    def problem(self, y: jax.Array) -> Problem:
        """Inpainting under this form."""
        problem = Problem.from_model(_model, self.prior, y=y)
        return problem.centred() if self.engine.centred else problem


def _model(prior: ScorePrior, y: jax.Array | None = None) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[:4], NOISE).to_event(2), obs=y)


def forms(quick: bool, sigma: float) -> dict[str, Form]:
    """The forms compared."""
    flow = digits_flow(jnp.float32)
    exact = ScorePrior(flow)
    score = ScorePrior(flow, FlowDensity(gradient=ScoreGradient(sigma)))
    free, few = (50, 50, 4) if quick else (250, 250, 4), (10, 10, 1) if quick else (40, 40, 1)
    return {
        "non-centred": Form(exact, NUTS(*free)),
        "centred, exact density and gradient": Form(
            exact, NUTS(*few, centred=True, max_tree_depth=5)
        ),
        f"centred, ScoreGradient({sigma:g})": Form(
            score, NUTS(*few, centred=True, max_tree_depth=5)
        ),
    }


def run(form: Form, y: jax.Array, key: jax.Array) -> dict[str, Any]:
    """Draws of one form: effective sample size, gradients, acceptance."""
    start = time.perf_counter()
    draws = form.engine.run(form.problem(y), key, progress=False)
    images = jax.vmap(jax.vmap(draws.problem.constrain))(draws.positions)["x"]
    ess = az.ess(az.from_dict({"posterior": {"x": np.asarray(images)}}))["x"]
    steps = np.asarray(draws.stats["n_steps"])  # [chain, draw]
    return {
        "draws": steps.size,
        "ess": float(ess.min()),
        "gradients per draw": float(steps.mean()),
        "lock-step gradients": int(steps.max(0).sum()),
        "acceptance": float(draws.stats["acceptance_rate"].mean()),
        "divergences": int(draws.stats["diverging"].sum()),
        "wall seconds, with compilation and warm-up": time.perf_counter() - start,
    }


def gradient_seconds(form: Form, y: jax.Array, repeats: int) -> float:
    """Median time of one value and gradient of all chains."""
    problem, num_chains = form.problem(y), form.engine.num_chains
    keys = jax.random.split(jax.random.key(3), num_chains)
    positions = jax.vmap(problem.initial)(keys)
    gradient = jax.jit(jax.vmap(jax.value_and_grad(problem.log_density)))
    return median_seconds(lambda: gradient(positions), repeats)


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "nuts")
    parser.add_argument("--sigma", type=float, default=0.2, help="level of the ScoreGradient")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    truth = np.asarray(load_images("digits"))[0] + 0.5
    y = jnp.asarray(truth[:4] + NOISE * np.random.default_rng(0).standard_normal((4, 8)))
    y = y.astype(jnp.float32)
    results = {}
    every = forms(options.quick, options.sigma)
    seconds = {name: gradient_seconds(form, y, 5) for name, form in every.items()}
    for name, form in every.items():
        found = run(form, y, jax.random.key(1))
        found["gradient seconds"] = seconds[name]
        found["ess per second"] = found["ess"] / (found["lock-step gradients"] * seconds[name])
        results[name] = found
        print(name, found, flush=True)
    best = results["non-centred"]["ess per second"]
    columns = ["draws", "ess", "gradients per draw", "gradient seconds", "acceptance"]
    rows = [
        [
            name,
            *(found[c] for c in columns),
            found["ess per second"],
            best / found["ess per second"],
        ]
        for name, found in results.items()
    ]
    columns = [*columns, "ESS per second", "non-centred over this"]
    show("Inpainting a digit", ["", *columns], rows)
    write(options.output, results)


if __name__ == "__main__":
    main()
