"""Guidance to an event: a condition that clean data meet, with no noise on it."""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Scalar, Sigma
from scoreprior._util import check_finite
from scoreprior.denoise.base import AbstractDenoiser, AbstractWrapper
from scoreprior.guide.base import Denoise, as_tree, log_normal


class AbstractCondition(eqx.Module):
    """A condition on `c(x)`, for a function `c` of one clean event."""

    function: eqx.AbstractVar[Callable[[Event], Float[Array, "*c"]]]

    @abstractmethod
    def log_prob(self, mean: Float[Array, " m"], covariance: Float[Array, "m m"]) -> Scalar:
        """Log probability, or density, for `c(x) ~ N(mean, covariance)`, flattened."""


class Equals(AbstractCondition):
    """`c(x) = value`, in every entry of `value` [*c]; there is a density and no probability."""

    function: Callable[[Event], Float[Array, "*c"]] = eqx.field(converter=as_tree)
    value: Float[Array, "*c"] = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        check_finite("value", self.value)

    def log_prob(self, mean: Float[Array, " m"], covariance: Float[Array, "m m"]) -> Scalar:
        if mean.size != self.value.size:
            raise ValueError(
                f"function must give as many numbers as value, {self.value.size}, got {mean.size}"
            )
        return log_normal(self.value.ravel(), mean, covariance)


class Exceeds(AbstractCondition):
    """`c(x) > threshold`, for a `c` that is one number."""

    function: Callable[[Event], Scalar] = eqx.field(converter=as_tree)
    threshold: Scalar = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        if self.threshold.ndim:
            raise ValueError(f"threshold must be one number, got shape {self.threshold.shape}")
        check_finite("threshold", self.threshold)

    def log_prob(self, mean: Float[Array, " m"], covariance: Float[Array, "m m"]) -> Scalar:
        if mean.size != 1:
            raise ValueError(f"function must give one number, got {mean.size}")
        above = (mean[0] - self.threshold) / jnp.sqrt(covariance[0, 0])
        return jax.scipy.stats.norm.logcdf(above)


class EventMoments(NamedTuple):
    """The law of `c(x)` given `x_t`, as `EventGuidance` has it."""

    x_hat: Event  # D(x_t), [*event]
    mean: Float[Array, " m"]
    covariance: Float[Array, "m m"]
    pull: Callable[[Float[Array, " m"]], Event]  # the product with J' A'

    @classmethod
    def make(
        cls, condition: AbstractCondition, denoise: Denoise, x: Event, sigma: Sigma
    ) -> "EventMoments":
        x_hat, pull = jax.vjp(denoise, x)
        mean, pull_condition = jax.vjp(lambda x: condition.function(x).ravel(), x_hat)
        rows = jax.vmap(lambda w: pull_condition(w)[0])(jnp.eye(mean.size, dtype=mean.dtype))
        spread = jnp.tensordot(
            jax.vmap(lambda row: pull(row)[0].ravel())(rows), rows.reshape(mean.size, -1).T, 1
        )
        covariance = sigma**2 * (spread + spread.T) / 2
        return cls(x_hat, mean, covariance, lambda w: pull(pull_condition(w)[0])[0])


class EventGuidance(AbstractWrapper):
    """The denoiser of data that meet a condition, by the moments of `c(x)` (Finzi et al. 2023).

        c(x) | x_t ~ N(c(D), S),     S = sigma^2 A J A',     D_c = D + sigma^2 J' A' g

    with `A = dc/dx` at `D`, `J = dD/dx_t` and `g` the derivative of the log probability of the
    condition with respect to the mean `c(D)`: `S^-1 (value - c(D))` for `Equals`, and
    `phi(z) / Phi(z) / sqrt(S)`, `z = (c(D) - threshold) / sqrt(S)`, for `Exceeds`. The derivative
    of `S` is neglected; the authors' code takes it, adds `1e-3 sigma^2` to `S` and has a logistic
    curve for `Phi`. Exact for a Gaussian prior and a linear `c`. One vector-Jacobian product per
    entry of `c`, and one more.

    Where `S` is not positive definite, of a network or of redundant entries of `c`, the result is
    NaN.
    """

    denoiser: AbstractDenoiser
    condition: AbstractCondition

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        moments = self._moments(x, sigma, context)
        slope = jax.grad(self.condition.log_prob)(moments.mean, moments.covariance)
        return moments.x_hat + sigma**2 * moments.pull(slope)

    def log_prob(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        """The log probability, or density, of the condition given `x_t = x`."""
        moments = self._moments(x, sigma, context)
        return self.condition.log_prob(moments.mean, moments.covariance)

    def _moments(self, x: Event, sigma: Sigma, context: Context) -> EventMoments:
        def denoise(x: Event) -> Event:
            return self.denoiser(x, sigma, context)

        return EventMoments.make(self.condition, denoise, x, sigma)


__all__ = ["AbstractCondition", "Equals", "EventGuidance", "EventMoments", "Exceeds"]
