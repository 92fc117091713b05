"""Compile time, memory and run time of one gradient, for one digit and for 64.

    python examples/benchmarks/cost.py [--quick]

The digits prior in single precision: the gradient of a likelihood through `Flow.to_data` (what the
non-centred form pays), and value with gradient of `log_prob` under each density policy (what the
centred form pays). Memory is the scratch space that XLA reports. CPU, about two minutes.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import arguments, digits_flow, held_out_digits, median_seconds, show, write

from scoreprior.density import (
    AbstractDensity,
    BoundDensity,
    Exact,
    FlowDensity,
    Hutchinson,
    ScoreGradient,
)
from scoreprior.flow import Flow

SCORE = ScoreGradient()
POLICIES: dict[str, AbstractDensity] = {
    "centred, FlowDensity(Exact())": FlowDensity(),
    "centred, FlowDensity(Hutchinson(4))": FlowDensity(Hutchinson(4)),
    "centred, FlowDensity(Exact(), ScoreGradient)": FlowDensity(Exact(), SCORE),
    "centred, FlowDensity(Hutchinson(4), ScoreGradient)": FlowDensity(Hutchinson(4), SCORE),
    "centred, BoundDensity(32)": BoundDensity(32),
}


def functions(flow: Flow) -> dict[str, Callable[[jax.Array], Any]]:
    """Value and gradient at one event, by the form of the posterior."""
    found = {
        "non-centred, to_data": jax.value_and_grad(lambda u: jnp.sum(flow.to_data(u) ** 2) / 2)
    }
    for name, policy in POLICIES.items():
        found[name] = jax.value_and_grad(lambda x, policy=policy: policy.log_prob(flow, x))
    return found


def measure(function: Callable[[jax.Array], Any], points: jax.Array, repeats: int) -> list[float]:
    """Seconds to compile, mebibytes of scratch, milliseconds to run."""
    start = time.perf_counter()
    compiled = jax.jit(jax.vmap(function)).lower(points).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return [compile_seconds, memory, 1e3 * median_seconds(lambda: compiled(points), repeats)]


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__, "cost").parse_args()
    flow = digits_flow(jnp.float32)
    points = held_out_digits(flow, 64)
    results, rows = {}, []
    for name, function in functions(flow).items():
        both = [measure(function, points[:n], 3 if options.quick else 7) for n in (1, 64)]
        results[name] = dict(zip(("batch 1", "batch 64"), both, strict=True))
        rows.append([name, *(value for pair in zip(*both, strict=True) for value in pair)])
    units = "compile, s", "memory, MiB", "run, ms"
    columns = [f"{unit}, {n}" for unit in units for n in (1, 64)]
    show("Value and gradient, at batch 1 and 64", ["", *columns], rows)
    write(options.output, {"columns": units, "gradients": results})


if __name__ == "__main__":
    main()
