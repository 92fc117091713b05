"""`TMPD` and `DiagonalTMPD`: Tweedie moment projected diffusions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior.guide.base import (
    AbstractGaussianGuidance,
    AbstractTwist,
    Denoise,
    Predicted,
    linearise,
)
from scoreprior.observation import AbstractObservation


class TMPD(AbstractGaussianGuidance):
    """`p(x | x_t) ~ N(D, sigma^2 dD/dx_t)`, both moments by Tweedie's formula (Boys et al. 2023).

    `S = cov_y + sigma^2 A J A'` and `B = A J` with `J = dD/dx_t`. Nothing to choose, and exact for
    a Gaussian prior. Costs one vector-Jacobian product per datum, and the memory of a matrix of
    data by data: `MMPS` is the same without the matrix. A nonlinear `f` is linearised at `D`.

    `A J A'` is symmetric and positive for a denoiser that is one. For a network the nearest matrix
    that is so takes its place: the symmetric part, with negative eigenvalues counted as zero.
    """

    def predict(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Event, Predicted]:
        x_hat, mean, A, AJ = linearise(denoise, observation, x)
        spread = AJ @ A.T
        values, vectors = jnp.linalg.eigh((spread + spread.T) / 2)
        spread = (vectors * jnp.maximum(values, 0)[None]) @ vectors.T
        covariance = observation.noise.covariance() + sigma**2 * spread
        return x_hat, Predicted(mean, A, AJ, covariance)


class DiagonalTMPD(AbstractTwist):
    """`TMPD` with `S` replaced by the diagonal matrix of its row sums (Boys et al. 2023).

        S ~ diag(cov_y 1 + sigma^2 A J A' 1)

    Two vector-Jacobian products, whatever the number of data. Exact where `S` is diagonal. Row sums
    may come near zero, or below: there the method fails, and nothing hides it.
    """

    def guide(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> Event:
        x_hat, _, _, direction = self._solve(denoise, observation, x, sigma)
        return x_hat + sigma**2 * direction

    def twist(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Scalar, Event]:
        """`log N(y; f(D), S)`, NaN where a row sum is negative, and `J' A' S^-1 (y - f(D))`."""
        _, error, sums, direction = self._solve(denoise, observation, x, sigma)
        return -0.5 * jnp.sum(error**2 / sums + jnp.log(2 * jnp.pi * sums)), direction

    def _solve(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Event, Array, Array, Event]:
        """`D`, `y - f(D)`, the diagonal of `S` and the direction."""
        x_hat, pullback = jax.vjp(denoise, x)
        mean, pull_operator = jax.vjp(observation.mean, x_hat)

        def spread(w: Array) -> Event:
            return pullback(pull_operator(w)[0])[0]

        ones, noise = jnp.ones_like(mean), observation.noise
        cross = spread(ones)
        seen = jax.jvp(observation.mean, (x_hat,), (cross,))[1]
        sums = noise.apply(noise.eigenvalues, ones) + sigma**2 * seen
        error = observation.data - mean
        return x_hat, error, sums, spread(error / sums)
