"""Single against double precision, and independence of a point from its batch.

    python examples/benchmarks/precision.py [--quick]

On held-out digits: differences between float32 and float64 of `log_prob` and of `to_data`; whether
the `log_prob` of a point changes, to the bit, with its neighbours in a batch of the same shape; and
the largest difference between a batched and a single call. CPU, about a minute.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, digits_flow, held_out_digits, log_probs, rms, show, write

from scoreprior.flow import Flow

DTYPES = (jnp.float32, jnp.float64)


@eqx.filter_jit
def to_data(flow: Flow, noise: jax.Array) -> jax.Array:
    """Digits from noise."""
    return jax.vmap(flow.to_data)(noise)


@eqx.filter_jit
def to_noise(flow: Flow, points: jax.Array) -> jax.Array:
    """Noise from digits."""
    return jax.vmap(flow.to_noise)(points)


def between_precisions(num: int) -> dict[str, list[float]]:
    """RMS and largest difference, float32 minus float64."""
    found = {}
    for dtype in DTYPES:
        flow = digits_flow(dtype)
        points = held_out_digits(digits_flow(jnp.float64), num).astype(dtype)
        noise = jnp.asarray(np.random.default_rng(1).standard_normal((num, 8, 8)), dtype)
        outputs = log_probs(flow, points), to_data(flow, noise), to_noise(flow, points)
        if any(output.dtype != dtype for output in outputs):
            raise TypeError(f"outputs must be {dtype}, got {[output.dtype for output in outputs]}")
        found[dtype] = outputs
    names = "log_prob, nats", "to_data, grey levels", "to_noise"
    pairs = zip(names, *found.values(), strict=True)
    return {name: [rms(a - b), float(jnp.max(jnp.abs(a - b)))] for name, a, b in pairs}


def within_batch(dtype: Any, num: int) -> dict[str, float | int]:
    """How a point's `log_prob` depends on its batch."""
    flow = digits_flow(dtype)
    points = held_out_digits(flow, num)
    together = log_probs(flow, points)
    others = points[::-1] + 3
    changed = 0
    places = (0, num // 2, num - 1)
    for i in places:
        alone = log_probs(flow, others.at[i].set(points[i]))[i]
        changed += int(np.asarray(alone).tobytes() != np.asarray(together[i]).tobytes())
    singles = jnp.stack([log_probs(flow, points[i : i + 1])[0] for i in range(8)])
    return {
        "points that changed with their neighbours": f"{changed} of {len(places)}",
        "single against batch, largest difference, nats": float(
            jnp.max(jnp.abs(singles - together[:8]))
        ),
    }


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__, "precision").parse_args()
    jax.config.update("jax_enable_x64", True)
    num = 16 if options.quick else 64
    precisions = between_precisions(num)
    columns = ["float32 - float64", "RMS", "largest"]
    show(f"{num} held-out digits", columns, [[name, *row] for name, row in precisions.items()])
    batches = {jnp.dtype(dtype).name: within_batch(dtype, num) for dtype in DTYPES}
    rows = [[name, *(batch[name] for batch in batches.values())] for name in batches["float32"]]
    show(f"Batches of {num}", ["log_prob", *batches], rows)
    write(options.output, {"precisions": precisions, "batches": batches})


if __name__ == "__main__":
    main()
