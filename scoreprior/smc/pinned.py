"""The posterior under linear data as a Feynman-Kac model that needs no derivative: MCGDiff.

Data `y = A x + N(0, L L')` are, with `L^-1 A = U diag(s) V'` and `tau_i = 1 / s_i`,

    z_i = v_i . x + tau_i n_i,        z = diag(1/s) U' L^-1 y,

and that is the law of coordinate `v_i . x_r` of the diffusion at level `r = tau_i`: noises of
orthogonal coordinates are independent, whatever their levels. So the posterior is the law of the
reverse chain given that coordinate `i` is `z_i` at level `tau_i` (Cardoso et al. 2023, "Monte Carlo
guided diffusion for Bayesian linear inverse problems", section 2; their tolerance kappa is zero
here). With the move `N(x + h a, h)` of the chain, `a` its drift, and the twist

    N(z_i; v_i . x, r^2 - tau_i^2)        while r > tau_i,

which would be right for a flat prior, the best move is known and the weight does not depend on it:

    log G_k = sum_i log N(z_i; v_i . (x + h_i a), u_i) - log N(z_i; v_i . x, u_i),

`u_i = r^2 - tau_i^2`, `h_i = min(h, u_i)`. Particles are resampled by it before they move. In the
step that passes `tau_i`, the rest of it starts from `z_i`.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from scoreprior._typing import Event, Key, Scalar
from scoreprior.denoise.base import Noised
from scoreprior.feynman_kac import FeynmanKacModel, Levels, over
from scoreprior.flow import Flow
from scoreprior.guide.base import operator
from scoreprior.guide.linear import Linear
from scoreprior.observation import AbstractObservation


class Coordinates(NamedTuple):
    """Data in the singular basis of their operator."""

    z: Float[Array, " m"]
    tau: Float[Array, " m"]
    V: Float[Array, "m n"]  # orthonormal rows
    log_scale: Scalar  # log p(y) - log p(z)

    @classmethod
    def make(cls, observation: AbstractObservation, x: Event) -> "Coordinates":
        """Raises `ValueError` where the data are not linear, or not independent of one another."""
        A = operator(observation, x)
        offset = observation.mean(x).ravel() - A @ x.ravel()
        elsewhere = jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) + x
        error = jnp.abs(observation.mean(elsewhere).ravel() - offset - A @ elsewhere.ravel())
        if not float(error.max()) <= 1e-3 * float(jnp.abs(A).sum()):
            raise ValueError(
                "MCGDiff needs a mean of the data that is linear in the event, got one that is "
                f"{float(error.max()):.3g} off its linear part: take TMPD() or Steering(...)"
            )
        root = jnp.linalg.cholesky(observation.noise.covariance())
        white = solve_triangular(root, A, lower=True)
        U, s, V = jnp.linalg.svd(white, full_matrices=False)
        if white.shape[0] > white.shape[1] or not float(s[-1]) > 1e-5 * float(s[0]):
            raise ValueError(
                "MCGDiff needs rows of the operator that are independent, got "
                f"{white.shape[0]} with singular values from {float(s[0]):.3g} to "
                f"{float(s[-1]):.3g}"
            )
        y = solve_triangular(root, observation.data.ravel() - offset, lower=True)
        log_scale = -jnp.sum(jnp.log(s)) - jnp.sum(jnp.log(jnp.diagonal(root)))
        return cls(U.T @ y / s, 1 / s, V, log_scale)


class Drifted(NamedTuple):
    """What is known of a particle."""

    drift: Event  # the score, extrapolated to the middle of the step ahead
    score: Event


class Pinned(eqx.Module):
    """The posterior of the event of `flow` given data in `coordinates`."""

    flow: Flow
    coordinates: Coordinates
    levels: Levels
    batch_size: int | None = eqx.field(static=True)

    def model(self) -> FeynmanKacModel:
        return FeynmanKacModel(self.init, self.propagate, self.levels.r.size, self.log_eta)

    def init(self, key: Key, num_particles: int) -> tuple[Event, Array, Drifted]:
        keys = jax.random.split(key, num_particles)
        return over(self._first, self.batch_size)(keys)

    def log_eta(self, k: Int[Array, ""], x: Event, known: Drifted) -> Float[Array, " particle"]:
        return jax.vmap(lambda x, known: self._log_g(k, x, known))(x, known)

    def propagate(
        self, key: Key, k: Int[Array, ""], x: Event, known: Drifted, log_weights: Array
    ) -> tuple[Event, Array, Drifted]:
        keys = jax.random.split(key, len(x))
        return over(lambda args: self._next(k, *args), self.batch_size)((keys, x, known))

    def _score(self, x: Event, r: Scalar) -> Event:
        denoiser = Noised(self.flow.denoiser, jnp.asarray(self.flow.sigma_min))
        return (denoiser(x, r) - x) / r**2

    def _first(self, key: Key) -> tuple[Event, Scalar, Drifted]:
        """Drawn as if the law of the data were the Gaussian of the moments."""
        z, tau, V, log_scale = self.coordinates
        moments, start = self.flow.moments, self.levels.start
        sigma = jnp.sqrt(self.flow.sigma_min**2 + start)
        spread = moments.eigenvalues + sigma**2
        rows = V.reshape(-1, *moments.event_shape)
        VP = jax.vmap(lambda row: moments.apply(spread, row))(rows).reshape(V.shape)
        key_draw, key = jax.random.split(key)
        draw = moments.sample(key_draw, sigma)
        # Data with more noise than the chain ever has are pinned above its start.
        S = jnp.diag(jnp.abs(start - tau**2))
        linear = Linear(V @ moments.mean.ravel(), V, VP)
        x, log_ratio = linear.condition(key, moments.mean, draw, z, S)
        twist = jnp.sum(_log_normal(z, V @ x.ravel(), jnp.diagonal(S)))
        score = self._score(x, self.levels.r[0])
        return x, log_scale + log_ratio + twist, Drifted(score, score)

    def _ahead(self, k: Int[Array, ""]) -> tuple[Array, Array]:
        """`u_i`, one where data are behind, and `h_i`, zero there."""
        u = self.levels.r[k] ** 2 - self.coordinates.tau**2
        return jnp.where(u > 0, u, 1.0), jnp.where(u > 0, jnp.minimum(self.levels.h[k], u), 0.0)

    def _log_g(self, k: Int[Array, ""], x: Event, known: Drifted) -> Scalar:
        (z, _, V, _), (u, h) = self.coordinates, self._ahead(k)
        here = V @ x.ravel()
        there = here + h * (V @ known.drift.ravel())
        return jnp.sum(_log_normal(z, there, u) - _log_normal(z, here, u))

    def _next(self, k: Int[Array, ""], key: Key, x: Event, known: Drifted) -> Any:
        z, _, V, _ = self.coordinates
        u, before = self._ahead(k)
        h = self.levels.h[k]
        key_free, key_pinned = jax.random.split(key)
        moved = x + h * known.drift + jnp.sqrt(h) * jax.random.normal(key_free, x.shape, x.dtype)
        # Coordinates with data ahead: up to `before` of the step led to z, the rest of it free.
        slope = V @ known.drift.ravel()
        gain = before / u
        lead = V @ x.ravel() + before * slope
        noise = jax.random.normal(key_pinned, (2, z.size), x.dtype)
        led = lead + gain * (z - lead) + jnp.sqrt(before * (1 - gain)) * noise[0]
        rest = h - before
        led = led + rest * slope + jnp.sqrt(rest) * noise[1]
        led = jnp.where(before > 0, led, V @ moved.ravel())
        moved = moved + (V.T @ (led - V @ moved.ravel())).reshape(x.shape)
        log_g = self._log_g(k, x, known)
        last = self.levels.r.size - 1
        score = self._score(moved, self.levels.r[jnp.minimum(k + 1, last)])
        ahead = self.levels.h[jnp.minimum(k + 1, last)] / (2 * h)
        return moved, log_g, Drifted(score + ahead * (score - known.score), score)


def _log_normal(z: Array, mean: Array, variance: Array) -> Array:
    return -0.5 * ((z - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance))


__all__ = ["Coordinates", "Pinned"]
