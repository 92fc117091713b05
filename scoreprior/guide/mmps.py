"""`MMPS`: moment matching posterior sampling."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior._util import check_count, check_positive
from scoreprior.guide.base import AbstractGaussianTwist, Denoise, Predicted
from scoreprior.guide.krylov import predict
from scoreprior.observation import AbstractObservation


class Solution(NamedTuple):
    """`v` with `S v ~ r`, the number of iterations, and `|S v - r| / |r|`."""

    v: Float[Array, "*y"]
    num_iterations: Int[Array, ""]
    residual: Scalar


class MMPS(AbstractGaussianTwist):
    """`TMPD` without a matrix (Rozet, Andry, Lanusse & Louppe 2024, section 4.2).

    Solves `(cov_y + sigma^2 A J A') v = y - f(D)` by conjugate gradients from zero, and gives
    `D + sigma^2 J' A' v`, with `J = dD/dx_t`. An iteration costs one vector-Jacobian product of the
    denoiser, and memory that of a few events. Iterated to the end it is `TMPD`; stopped early it
    pulls less along the directions that data determine least, and is stable where `J` is not quite
    symmetric.

    As a twist, `predict`, it is `TMPD` of a few combinations of the data: those of the Krylov space
    in which `max_iterations` of conjugate gradients find `v`, and those of as many iterations from
    each of `num_probes` fixed directions, which see what the first leave out and give the
    determinant of the rest (see `guide.krylov`). It is `TMPD` where these are all the data.

    **Arguments:** `max_iterations`; `rtol`, the relative residual at which iterations end, but for
    a twist; `num_probes`, of a twist: each costs as many products as the iterations do, and without
    any nothing is known of the determinant of the rest. `solution(...)` says how many iterations
    there were and what residual they left.
    """

    max_iterations: int = eqx.field(static=True, default=5)
    rtol: float = eqx.field(static=True, default=1e-3, kw_only=True)
    num_probes: int = eqx.field(static=True, default=0, kw_only=True)

    def __check_init__(self):
        check_count("max_iterations", self.max_iterations)
        check_positive("rtol", self.rtol)
        check_count("num_probes", self.num_probes, least=0)

    def predict(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Event, Predicted]:
        return predict(denoise, observation, x, sigma, self.max_iterations, self.num_probes)

    def guide(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> Event:
        return self._solve(denoise, observation, x, sigma)[0]

    def solution(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> Solution:
        """The linear system solved at `x`."""
        return self._solve(denoise, observation, x, sigma)[1]

    def _solve(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Event, Solution]:
        x_hat, push = jax.linearize(denoise, x)
        mean, see = jax.linearize(observation.mean, x_hat)
        pull, pull_operator = jax.linear_transpose(push, x), jax.linear_transpose(see, x_hat)
        noise = observation.noise

        def cross(w: Array) -> Event:
            return sigma**2 * pull(pull_operator(w)[0])[0]

        def system(w: Array) -> Array:
            return noise.apply(noise.eigenvalues, w) + see(cross(w))

        found = conjugate_gradients(system, observation.data - mean, self.max_iterations, self.rtol)
        return x_hat + cross(found.v), found


def conjugate_gradients(
    system: Denoise, right: Float[Array, "*y"], max_iterations: int, rtol: float
) -> Solution:
    """Conjugate gradients from zero (Hestenes & Stiefel 1952), counted.

    `jax.scipy.sparse.linalg.cg` does not say how many iterations it made.
    """
    start = jnp.sum(right**2)

    def unfinished(carry: tuple) -> Array:
        count, _, _, _, square = carry
        return (count < max_iterations) & (square > rtol**2 * start)

    def body(carry: tuple) -> tuple:
        count, v, residual, direction, square = carry
        image = system(direction)
        step = square / jnp.sum(direction * image)
        v, residual = v + step * direction, residual - step * image
        new = jnp.sum(residual**2)
        return count + 1, v, residual, residual + new / square * direction, new

    first = jnp.zeros((), jnp.int32), jnp.zeros_like(right), right, right, start
    count, v, _, _, square = jax.lax.while_loop(unfinished, body, first)
    relative = jnp.where(start > 0, jnp.sqrt(square / jnp.where(start > 0, start, 1)), 0)
    return Solution(v, count, relative)
