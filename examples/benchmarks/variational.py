"""Time for variational inference to reach a fixed ELBO when inpainting a digit, by the form.

    python examples/benchmarks/variational.py [--quick]

The upper half of a held-out digit is seen with noise of one grey level, the lower half is hidden.
One guide, `FullRank`, one bound, `ELBO(8)`: non-centred by `NaturalGradient`, from the scale of the
prior; and by Adam at a constant learning rate, non-centred; centred with the density of the
probability-flow ODE by the settings of the published code (Feng et al. 2023): the
variance-preserving SDE, Dopri5 with rtol 1e-3 and atol 1e-5, 16 Rademacher probes of the trace;
centred with our `FlowDensity()`, whitened, ten steps of a fixed grid, exact trace; and centred with
`BoundDensity(32)`, as in Feng & Bouman (2024), judged by its own, lower ELBO.

Every form gets the better of two learning rates, by the time to each target. Targets lie 20, 10 and
3 nats below the ELBO that the form with `FlowDensity()` holds at the end. The ELBO is estimated
after every few steps by 128 draws of the guide, while the clock stands. Times are those of the
compiled steps alone, medians over runs: wall seconds, and seconds of all processors, which other
work changes less.
"""

import statistics
import time
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from common import PlainTime, arguments, digits_flow, show, vp_log_probs, write

from scoreprior import VI, BoundDensity, FlowDensity, Problem, ScorePrior
from scoreprior.density import AbstractDensity, Hutchinson
from scoreprior.flow import Adaptive, Flow
from scoreprior.io import load_images
from scoreprior.vi import FullRank, NaturalGradient
from scoreprior.vi.engine import _advance, _start
from scoreprior.vi.frame import Frame, form

RATES = (0.03, 0.1)
NUM_DRAWS = 128
BELOW = (20, 10, 3)
NATURAL = "non-centred, NaturalGradient()"
ODE, PUBLISHED = "centred, FlowDensity()", "centred, as published"


class Form(NamedTuple):
    """A problem and how it is fitted: an engine for every rate."""

    problem: Problem
    engines: dict[str, VI]


class Curve(NamedTuple):
    """Wall and processor seconds, and the ELBO, after every chunk of steps."""

    seconds: np.ndarray
    processor: np.ndarray
    bound: np.ndarray

    def reaches(self, target: float) -> np.ndarray:
        """Wall and processor seconds until the bound is at `target`; infinite if it never is."""
        hit = np.flatnonzero(self.bound >= target)
        both = np.stack([self.seconds, self.processor])
        return both[:, hit[0]] if len(hit) else np.full(2, np.inf)


class PublishedDensity(AbstractDensity):
    """The density of Feng et al. (2023) by the settings of `configs/dpi_config.py` in their code.

    Two things differ: probes are the same at every step, and the gradient is taken through the
    solver with checkpoints, where theirs is a second, backward solve.
    """

    def log_prob(self, flow: Flow, x: jax.Array) -> jax.Array:
        solver = Adaptive(1e-3, 1e-5, PlainTime(), diffrax.Dopri5(), max_steps=256)
        log_probs, _ = vp_log_probs(flow, x, solver, Hutchinson(16), flow.sigma_max)
        return log_probs[1]


def problem(density: AbstractDensity) -> Problem:
    """The posterior of a digit whose upper half is seen."""
    flow = digits_flow(jnp.float32)
    truth = np.asarray(load_images("digits"))[0] + 0.5
    seen = truth[:4] + np.random.default_rng(0).standard_normal((4, 8))
    prior = ScorePrior(flow, density)

    def model(y: jax.Array) -> None:
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[:4], 1.0).to_event(2), obs=y)

    return Problem.from_model(model, jnp.asarray(seen, jnp.float32))


def fit(engine: VI, of: Problem, seed: int) -> Curve:
    """The fit, chunk by chunk, compiled before the clock starts."""
    of = form(of, engine.centred)
    key_start, key_steps = jax.random.split(jax.random.key(seed))
    frame, state, _ = _start(engine, of, key_start)
    count = jnp.asarray(engine.chunk_size)
    jax.block_until_ready(
        _advance(engine, of, frame, state, key_steps, jnp.asarray(0), jnp.asarray(1))
    )
    seconds, bounds, spent = [], [], np.zeros(2)
    for start in range(0, engine.num_steps, engine.chunk_size):
        begun = clock()
        state, _ = jax.block_until_ready(
            _advance(engine, of, frame, state, key_steps, jnp.asarray(start), count)
        )
        spent = spent + clock() - begun
        seconds.append(spent)
        bounds.append(float(elbo(engine, of, frame, state.params, jax.random.key(start))))
    return Curve(*np.array(seconds).T, np.array(bounds))


def clock() -> np.ndarray:
    """Wall and processor seconds."""
    return np.array([time.perf_counter(), time.process_time()])


@eqx.filter_jit
def elbo(engine: VI, of: Problem, frame: Frame, params: Any, key: jax.Array) -> jax.Array:
    """The bound by fresh draws of the guide."""
    guide = engine.guide.distribution(params)

    def log_weight(key: jax.Array) -> jax.Array:
        z = guide.sample(key)
        return of.log_density(frame.position(z)) + frame.log_det - guide.log_prob(z)

    keys = jax.random.split(key, NUM_DRAWS)
    return jnp.mean(jax.lax.map(log_weight, keys, batch_size=16))


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "variational")
    parser.add_argument("--runs", type=int, default=3, help="runs of every form at its best rate")
    options = parser.parse_args()
    quick, runs = options.quick, 1 if options.quick else options.runs

    def adam(num_steps: int, chunk_size: int, centred: bool) -> dict[str, VI]:
        settings = {"centred": centred, "chunk_size": chunk_size}
        return {
            str(rate): VI(FullRank(), num_steps, optimizer=optax.adam(rate), **settings)
            for rate in RATES
        }

    many, few = (200, 40) if quick else (600, 80)
    natural = VI(FullRank(1.0), 40, optimizer=NaturalGradient(), chunk_size=1)
    forms = {
        NATURAL: Form(problem(FlowDensity()), {"": natural}),
        "non-centred": Form(problem(FlowDensity()), adam(many, 10, False)),
        PUBLISHED: Form(problem(PublishedDensity()), adam(few, 2, True)),
        ODE: Form(problem(FlowDensity()), adam(few, 2, True)),
        "centred, BoundDensity(32)": Form(problem(BoundDensity(32)), adam(many, 10, True)),
    }
    curves: dict[str, dict[str, list[Curve]]] = {}
    for name, (of, engines) in forms.items():
        curves[name] = {}
        for rate, engine in engines.items():
            found = curves[name][rate] = [fit(engine, of, seed) for seed in range(runs)]
            bounds = np.round(found[0].bound[:: max(len(found[0].bound) // 5, 1)], 1)
            print(name, rate, f"{found[0].seconds[-1]:.1f} s", bounds, flush=True)
    end = max(float(np.median([c.bound[-1] for c in found])) for found in curves[ODE].values())
    targets = [end - below for below in BELOW]
    rows = []
    for name, by_rate in curves.items():
        steps = next(iter(forms[name].engines.values())).num_steps
        every = [curve for found in by_rate.values() for curve in found]
        per_step = [
            1e3 * statistics.median(float(times[-1]) / steps for times in of_all)
            for of_all in ([c.seconds for c in every], [c.processor for c in every])
        ]
        reached = [_fastest(by_rate, target) for target in targets]
        last = max(float(np.median([c.bound[-1] for c in found])) for found in by_rate.values())
        rows.append([name, *per_step, last, *(seconds for pair in reached for seconds in pair)])
    columns = ["", "ms per step", "processor ms", "last bound"]
    for target in targets:
        columns += [f"s to {target:.1f}", "processor s"]
    show("Time to an ELBO", columns, rows)
    ratios = [[row[0], *(a / b for a, b in zip(row[4:], rows[0][4:], strict=True))] for row in rows]
    show(f"over {NATURAL}", ["", *columns[4:]], ratios)
    series = {
        name: {rate: [[leaf.tolist() for leaf in c] for c in found] for rate, found in x.items()}
        for name, x in curves.items()
    }
    write(options.output, {"targets": targets, "rows": rows, "curves": series})


def _fastest(by_rate: dict[str, list[Curve]], target: float) -> np.ndarray:
    """Median wall and processor seconds to the target, by the better rate."""
    medians = [np.median([c.reaches(target) for c in found], 0) for found in by_rate.values()]
    return min(medians, key=lambda pair: pair[1])


if __name__ == "__main__":
    main()
