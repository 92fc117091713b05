"""Conditioning a Gaussian event on linear data, with the weight of having done so."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float

from scoreprior._typing import Event, Key, Scalar, Sigma
from scoreprior.gaussian import Moments
from scoreprior.guide.base import log_normal, operator
from scoreprior.observation import AbstractObservation


class Linear(NamedTuple):
    """A linear prediction of the data, `mean + B (x - centre)`, for `x ~ N(centre, P)`."""

    mean: Float[Array, " m"]
    B: Float[Array, "m n"]
    BP: Float[Array, "m n"]

    def condition(
        self, key: Key, centre: Event, draw: Event, y: Float[Array, " m"], S: Float[Array, "m m"]
    ) -> tuple[Event, Scalar]:
        """A `draw` of `N(centre, P)` made one of the posterior given `y`, by Matheron's rule.

        And `log N(centre, P) - log posterior` there, which Bayes' rule makes a ratio of densities
        of the data, less the likelihood: `log N(y; mean, S + B P B') - log N(y; prediction, S)`.
        """
        root = jnp.linalg.cholesky(S)
        noise = root @ jax.random.normal(key, y.shape, y.dtype)
        offset = self.B @ (draw - centre).ravel()
        evidence = S + self.BP @ self.B.T
        evidence = (evidence + evidence.T) / 2
        step = cho_solve((jnp.linalg.cholesky(evidence), True), y - self.mean - offset - noise)
        x = draw + (self.BP.T @ step).reshape(draw.shape)
        prediction = self.mean + self.B @ (x - centre).ravel()
        log_ratio = log_normal(y, self.mean, evidence) - log_normal(y, prediction, S)
        return x, log_ratio


def first_event(
    moments: Moments,
    observation: AbstractObservation,
    sigma_min: Sigma,
    variance: Scalar,
    key: Key,
) -> tuple[Event, Scalar]:
    """A noisy event given the data, as if the data of the prior were Gaussian.

    For `x ~ N(m, C + sigma_min^2 I)` and `x_t = x + N(0, variance I)`: a draw of `x_t` given `y`,
    exact for a Gaussian prior and linear data, and the log of the ratio of the law of `x_t` to that
    from which it was drawn.
    """
    key_draw, key = jax.random.split(key)
    spread = moments.eigenvalues + sigma_min**2
    A = operator(observation, moments.mean)
    rows = A.reshape(-1, *moments.event_shape)

    def rescaled(factor: Event) -> Array:
        return jax.vmap(lambda row: moments.apply(factor, row))(rows).reshape(A.shape)

    B = rescaled(spread / (spread + variance))
    S = observation.noise.covariance() + variance * B @ A.T
    linear = Linear(observation.mean(moments.mean).ravel(), B, rescaled(spread))
    draw = moments.sample(key_draw, jnp.sqrt(sigma_min**2 + variance))
    y = observation.data.ravel()
    return linear.condition(key, moments.mean, draw, y, (S + S.T) / 2)


__all__ = ["Linear", "first_event"]
