"""At which noise level the score may stand in for the gradient of the flow density.

    python examples/benchmarks/score_gradient.py [--quick]

On held-out digits, for levels from half to ten times sigma_min: the relative distance between the
score `s(x, sigma)` and the gradient of `log p` through the flow, the cosine between them, and what
counts in a Metropolis-corrected kernel: the mean acceptance of five leapfrog steps along the score,
at three step sizes in grey levels, with the exact value of `log p`. The gradient itself comes last.
CPU, about two minutes.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, digits_flow, held_out_digits, log_probs, show, write

from scoreprior.density import FlowDensity
from scoreprior.flow import Flow

MULTIPLES = (0.5, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0, 10.0)
STEP_SIZES = (0.05, 0.1, 0.2)
NUM_STEPS = 5


@eqx.filter_jit
def flow_gradients(flow: Flow, points: jax.Array) -> jax.Array:
    """Gradient of `log p` through the solver, one point at a time."""
    return jax.lax.map(jax.grad(lambda x: FlowDensity().log_prob(flow, x)), points)


@eqx.filter_jit
def scores(flow: Flow, points: jax.Array, sigma: jax.Array) -> jax.Array:
    """The score at level `sigma`."""
    return jax.vmap(lambda x: (flow.denoiser(x, sigma) - x) / sigma**2)(points)


def acceptance(
    flow: Flow, points: jax.Array, field: Callable[[jax.Array], jax.Array], step_size: float
) -> float:
    """Mean acceptance of `NUM_STEPS` leapfrog steps along `field`, from `points`."""
    rng = np.random.default_rng(2)
    start = jnp.asarray(rng.standard_normal(points.shape), points.dtype)
    x, momentum = points, start + step_size / 2 * field(points)
    for i in range(NUM_STEPS):
        x = x + step_size * momentum
        half = 0.5 if i == NUM_STEPS - 1 else 1.0
        momentum = momentum + half * step_size * field(x)
    kinetic = (jnp.sum(start**2, (1, 2)) - jnp.sum(momentum**2, (1, 2))) / 2
    log_ratio = log_probs(flow, x) - log_probs(flow, points) + kinetic
    return float(jnp.mean(jnp.exp(jnp.minimum(log_ratio, 0))))


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__, "score_gradient").parse_args()
    flow = digits_flow(jnp.float32)
    points = held_out_digits(flow, 8 if options.quick else 64)
    gradients = flow_gradients(flow, points)
    norms = jnp.linalg.norm(gradients, axis=(1, 2))
    rows = []
    for multiple in MULTIPLES:
        sigma = jnp.float32(multiple * flow.sigma_min)
        found = scores(flow, points, sigma)
        distances = jnp.linalg.norm(found - gradients, axis=(1, 2)) / norms
        cosines = jnp.sum(found * gradients, (1, 2)) / norms
        cosines = cosines / jnp.linalg.norm(found, axis=(1, 2))
        field = lambda x, sigma=sigma: scores(flow, x, sigma)  # noqa: E731
        rates = [acceptance(flow, points, field, size) for size in STEP_SIZES]
        rows.append(
            [float(sigma), float(jnp.median(distances)), float(jnp.median(cosines)), *rates]
        )
    field = lambda x: flow_gradients(flow, x)  # noqa: E731
    rates = [acceptance(flow, points, field, size) for size in STEP_SIZES]
    rows.append(["flow gradient", 0.0, 1.0, *rates])
    columns = ["sigma", "distance", "cosine", *(f"acceptance, {size}" for size in STEP_SIZES)]
    show(f"Medians over {len(points)} held-out digits", columns, rows)
    write(options.output, {"columns": columns, "rows": rows})


if __name__ == "__main__":
    main()
