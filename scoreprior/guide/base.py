"""Guidance: the denoiser of a posterior, made from the denoiser of a prior.

For data `y = f(x) + N(0, cov_y)` the denoiser of the posterior is

    D_y(x_t, sigma) = E[X | x_t, y] = D(x_t, sigma) + sigma^2 grad log p(y | x_t),

with `p(y | x_t)` the mean of `p(y | x)` over `p(x | x_t)`, which no method here knows exactly
unless the prior is Gaussian. A method is an approximation of it. Most are Gaussian,

    p(y | x_t) ~ N(mean, S),        D_y = D + sigma^2 B' S^-1 (y - mean),

and differ in the `mean`, in its derivative `B` with respect to `x_t` and in `S`. Everything here is
for one event, with `m` entries of data and `n` of the event.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from jax.tree_util import all_leaves
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Scalar, Sigma
from scoreprior.denoise.base import AbstractDenoiser, AbstractWrapper
from scoreprior.gaussian import Moments
from scoreprior.observation import AbstractObservation

Denoise = Callable[[Event], Event]
"""A denoiser at one noise level."""


def as_tree(function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function as a pytree without leaves, so that its holder may cross `jit`."""
    return jax.tree_util.Partial(function) if all_leaves([function]) else function


class AbstractGuidance(eqx.Module):
    """A method: called with the denoiser of a prior and an observation, it gives a denoiser."""

    @abstractmethod
    def guide(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> Event:
        """`D_y(x, sigma)`, with `denoise(x) = D(x, sigma)`."""

    def __call__(
        self, denoiser: AbstractDenoiser, observation: AbstractObservation
    ) -> "GuidedDenoiser":
        """The denoiser of the posterior."""
        return GuidedDenoiser(denoiser, self, observation)


class GuidedDenoiser(AbstractWrapper):
    """The denoiser of a posterior, as `guidance` has it: usable wherever a denoiser is."""

    denoiser: AbstractDenoiser
    guidance: AbstractGuidance
    observation: AbstractObservation

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        def denoise(x: Event) -> Event:
            return self.denoiser(x, sigma, context)

        return self.guidance.guide(denoise, self.observation, x, sigma)


class AbstractTwist(AbstractGuidance):
    """A method that also says how likely the data are, so that weights can correct it."""

    @abstractmethod
    def twist(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Scalar, Event]:
        """`tau ~ log p(y | x_t = x)` up to a constant, and the direction in which it grows."""


class Predicted(NamedTuple):
    """`p(Q y | x_t) ~ N(mean, covariance)` at a point, for `k` combinations `Q y` of the data.

    `B` is the derivative of the mean with respect to `x_t`, as the method has it, and `A` that of
    `Q f`, whence `B = A J` for a Jacobian `J` of the denoiser. `basis` is `Q`, with orthonormal
    rows, or `None` for the data themselves, and `log_rest` what is said of the log density of the
    data outside, if anything.
    """

    mean: Float[Array, " k"]
    A: Float[Array, "k n"]
    B: Float[Array, "k n"]
    covariance: Float[Array, "k k"]
    basis: Float[Array, "k m"] | None = None
    log_rest: Scalar | None = None

    def combine(self, y: Float[Array, " m"]) -> Float[Array, " k"]:
        """`Q y`."""
        return y if self.basis is None else self.basis @ y

    def noise(self, noise: Moments) -> Float[Array, "k k"]:
        """`Q cov_y Q'`."""
        return noise.covariance() if self.basis is None else compress(noise, self.basis)

    def log_prob(self, y: Float[Array, " m"]) -> Scalar:
        """The log density of the data, as far as it is known."""
        log_prob = log_normal(self.combine(y), self.mean, self.covariance)
        return log_prob if self.log_rest is None else log_prob + self.log_rest

    def pull(self, y: Float[Array, " m"]) -> Float[Array, " n"]:
        """`B' S^-1 (Q y - mean)`: the approximate gradient of `log p(y | x_t)`."""
        error = self.combine(y) - self.mean
        return self.B.T @ cho_solve(cho_factor(self.covariance, lower=True), error)


def compress(noise: Moments, basis: Float[Array, "k m"]) -> Float[Array, "k k"]:
    """`Q C Q'` for the covariance `C` of `noise`, without a matrix of data by data."""
    rows = basis.reshape(-1, *noise.event_shape)
    images = jax.vmap(lambda row: noise.apply(noise.eigenvalues, row))(rows)
    return images.reshape(basis.shape) @ basis.T


class AbstractGaussianTwist(AbstractTwist):
    """A method with a Gaussian `p(y | x_t)`, of the data or of combinations of them."""

    @abstractmethod
    def predict(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Event, Predicted]:
        """`D(x, sigma)`, and the law of the data given `x_t = x`."""

    def twist(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Scalar, Event]:
        """`log N(y; mean, S)` and `B' S^-1 (y - mean)`."""
        y = observation.data.ravel()
        _, predicted = self.predict(denoise, observation, x, sigma)
        return predicted.log_prob(y), predicted.pull(y).reshape(x.shape)


class AbstractGaussianGuidance(AbstractGaussianTwist):
    """A method whose denoiser, too, is that of its Gaussian `p(y | x_t)`."""

    def guide(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> Event:
        x_hat, predicted = self.predict(denoise, observation, x, sigma)
        return x_hat + sigma**2 * predicted.pull(observation.data.ravel()).reshape(x.shape)


def log_normal(
    y: Float[Array, " m"], mean: Float[Array, " m"], covariance: Float[Array, "m m"]
) -> Scalar:
    """`log N(y; mean, covariance)`."""
    root = jnp.linalg.cholesky(covariance)
    white = solve_triangular(root, y - mean, lower=True)
    log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
    return -0.5 * (jnp.sum(white**2) + y.size * jnp.log(2 * jnp.pi)) - log_det


class Linearised(NamedTuple):
    """The observation of `D(x)` and its derivative with respect to `x`."""

    x_hat: Event  # [*event]
    mean: Float[Array, " m"]  # f(D)
    A: Float[Array, "m n"]  # df/dx at D
    AJ: Float[Array, "m n"]  # A dD/dx_t


def linearise(denoise: Denoise, observation: AbstractObservation, x: Event) -> Linearised:
    """One evaluation of the denoiser and `m` of its vector-Jacobian products."""

    def seen(x: Event) -> tuple[Array, Event]:
        x_hat = denoise(x)
        return observation.mean(x_hat).ravel(), x_hat

    mean, pullback, x_hat = jax.vjp(seen, x, has_aux=True)
    rows = jax.vmap(lambda w: pullback(w)[0].ravel())(jnp.eye(mean.size, dtype=mean.dtype))
    return Linearised(x_hat, mean, operator(observation, x_hat), rows)


def operator(observation: AbstractObservation, x: Event) -> Float[Array, "m n"]:
    """`A = df/dx` at `x`, on flattened events and data."""
    jacobian = jax.jacrev(lambda x: observation.mean(x).ravel())(x)
    return jacobian.reshape(len(jacobian), -1)


__all__ = [
    "AbstractGaussianGuidance",
    "AbstractGaussianTwist",
    "AbstractGuidance",
    "AbstractTwist",
    "GuidedDenoiser",
    "Linearised",
    "Predicted",
    "as_tree",
    "compress",
    "linearise",
    "log_normal",
    "operator",
]
