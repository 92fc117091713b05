"""What whitening makes unnecessary: a large sigma_max, and steps at high noise.

    python examples/benchmarks/flow_limits.py [--quick]

On held-out digits (learned denoiser) and on a Gaussian mixture (exact density), in double
precision. `s` is the largest standard deviation of the data.

First table: error of the log density by sigma_max, on a fine grid, when the terminal law is matched
in both moments, as it is for the whitened flow, and when it is N(m, sigma_max^2 I). For the digits
the reference has the largest sigma_max that the network knows.

Second table: error by the number of Kutta-3 steps between `s` and `10 s`, with a fine grid below,
for the whitened flow and for `dx/dsigma = (x - D)/sigma`, both with the matched terminal law. CPU,
about four minutes.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from common import (
    arguments,
    digits_flow,
    held_out_digits,
    log_probs,
    plain_log_probs,
    rms,
    show,
    with_solver,
    write,
)
from log_density_mixture import KINDS, SIGMA_MIN, draws, mixture

from scoreprior.flow import AbstractSolver, FixedGrid, Flow, LogTime

FINE = FixedGrid(100)
MULTIPLES = (1.0, 2.0, 5.0, 10.0)
STEPS = (1, 2, 4, 8)


class Spliced(AbstractSolver):
    """A fine grid below noise level `level`, `num_steps` steps above it."""

    level: float
    num_steps: int = eqx.field(static=True)

    def solve(self, field, y, start, stop):
        """Upwards only: from data to noise."""
        y = FINE.solve(field, y, start, self.level)
        return FixedGrid(self.num_steps, LogTime()).solve(field, y, self.level, stop)


def up_to(flow: Flow, sigma_max: float, solver: AbstractSolver) -> Flow:
    """`flow` with another end and solver."""
    return Flow(
        flow.denoiser, flow.moments, sigma_min=flow.sigma_min, sigma_max=sigma_max, solver=solver
    )


def isotropic_end(flow: Flow, points: jax.Array) -> jax.Array:
    """Log density when the terminal law is N(m, sigma_max^2 I)."""
    flat = eqx.tree_at(
        lambda f: f.moments.eigenvalues, flow, jnp.zeros_like(flow.moments.eigenvalues)
    )
    return log_probs(flat, points)


def study(flow: Flow, points: jax.Array, truth: jax.Array) -> tuple[list, list]:
    """Rows of the two tables."""
    largest = float(jnp.sqrt(flow.moments.eigenvalues.max()))
    ends = [up_to(flow, multiple * largest, FINE) for multiple in MULTIPLES]
    by_end = [
        ["both moments matched", *(rms(log_probs(f, points) - truth) for f in ends)],
        ["N(m, sigma_max^2 I)", *(rms(isotropic_end(f, points) - truth) for f in ends)],
    ]
    far = up_to(flow, 10 * largest, FINE)
    reference = log_probs(far, points)
    solvers = [Spliced(largest, num_steps) for num_steps in STEPS]
    by_steps = [
        ["whitened", *(rms(log_probs(with_solver(far, s), points) - reference) for s in solvers)],
        ["plain", *(rms(plain_log_probs(far, points, s)[:, 1] - reference) for s in solvers)],
    ]
    return by_end, by_steps


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__, "flow_limits").parse_args()
    jax.config.update("jax_enable_x64", True)
    digits = digits_flow(jnp.float64)
    images = held_out_digits(digits, 4 if options.quick else 32)
    law = mixture(0, **KINDS["separate"])
    points = draws(law, 32 if options.quick else 256)
    cases = {
        "digits": (digits, images, log_probs(with_solver(digits, FINE), images)),
        "mixture": (
            Flow(law, law.moments(), sigma_min=SIGMA_MIN),
            points,
            jax.vmap(lambda x: law.log_prob(x, SIGMA_MIN))(points),
        ),
    }
    results = {}
    for name, case in cases.items():
        by_end, by_steps = study(*case)
        results[name] = {"sigma_max": by_end, "steps": by_steps}
        columns = [f"{multiple:g} s" for multiple in MULTIPLES]
        show(f"{name}: RMS error, nats, by sigma_max", ["terminal law", *columns], by_end)
        columns = [str(n) for n in STEPS]
        show(f"{name}: RMS error, nats, by steps above s", ["flow", *columns], by_steps)
    write(options.output, results)


if __name__ == "__main__":
    main()
