"""Denoisers in closed form: the oracles of the library, and priors that need no training.

For data with law `p`, noised data have law `p_sigma = p * N(0, sigma^2 I)`. For a Gaussian or a
Gaussian mixture, `p_sigma`, its score, the posterior given a linear-Gaussian observation and the
evidence are all exact.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Key, Scalar, Sigma
from scoreprior._util import check_finite, check_positive, is_traced
from scoreprior.denoise.base import AbstractDenoiser, AbstractWrapper
from scoreprior.gaussian import Moments, StandardBasis


class AbstractExact(AbstractDenoiser):
    """A denoiser whose law is known."""

    @abstractmethod
    def log_prob(self, x: Event, sigma: Sigma = 0.0) -> Scalar:
        """`log p_sigma(x)` at one event."""

    @abstractmethod
    def sample(self, key: Key) -> Event:
        """One draw of clean data."""

    @abstractmethod
    def moments(self) -> Moments:
        """Exact mean and covariance of clean data."""

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        """`-log p_sigma(x)`, constant and all."""
        return -self.log_prob(x, sigma)

    def covariance(self, x: Event, sigma: Sigma) -> Float[Array, "size size"]:
        """`Cov[X | x_t = x] = sigma^2 dD/dx` over flattened events (Tweedie's formula)."""
        jacobian = jax.jacfwd(lambda flat: self(flat.reshape(x.shape), sigma).ravel())(x.ravel())
        return sigma**2 * (jacobian + jacobian.T) / 2


class Gaussian(AbstractExact):
    """Data with law `N(m, C)`, given by their `Moments`."""

    law: Moments

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        return self.law.denoise(x, sigma)

    def score(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        return _gaussian_score(self.law, x, sigma)

    def log_prob(self, x: Event, sigma: Sigma = 0.0) -> Scalar:
        return self.law.log_prob(x, sigma)

    def sample(self, key: Key) -> Event:
        return self.law.sample(key)

    def moments(self) -> Moments:
        return self.law

    def posterior(
        self, A: Float[Array, "m size"], y: Float[Array, " m"], cov_y: Float[Array, "m m"]
    ) -> "Gaussian":
        """Law of `X` given `y = A x + N(0, cov_y)`, with `A` acting on the flattened event."""
        A, y, cov_y = _check_observation(A, y, cov_y, self.law.size)
        return Gaussian(Moments.dense(*_condition(self.law, A, y, cov_y)))

    def log_evidence(
        self, A: Float[Array, "m size"], y: Float[Array, " m"], cov_y: Float[Array, "m m"]
    ) -> Scalar:
        """`log p(y)` for `y = A x + N(0, cov_y)`."""
        A, y, cov_y = _check_observation(A, y, cov_y, self.law.size)
        return _log_evidence(self.law, A, y, cov_y)


class GaussianMixture(AbstractExact):
    """Data with law `sum_k w_k N(m_k, C_k)`; build with `shared`, `diagonal` or `full`.

    `log_weights` [K]; `components`, `Moments` whose mean and eigenvalues carry a leading axis K
    and whose basis does too, unless the components share it (`StandardBasis`, `shared`). Where they
    share the whole covariance (`shared`, and `diagonal` with one set of variances), what an
    evaluation costs is two products with the means, K times the size of an event.
    """

    log_weights: Float[Array, " K"]
    components: Moments
    shared_basis: bool = eqx.field(static=True)
    shared_covariance: bool = eqx.field(static=True, default=False)

    @classmethod
    def shared(
        cls,
        weights: Float[Array, " K"],
        means: Float[Array, "K *event"],
        covariance: Float[Array, "size size"],
    ) -> "GaussianMixture":
        """All components with one `covariance` [size, size]."""
        log_weights, means = _check_mixture(weights, means)
        law = Moments.dense(means[0], covariance)
        values = jnp.broadcast_to(law.eigenvalues, means.shape)
        return cls(log_weights, Moments(means, values, law.basis), True, True)

    @classmethod
    def diagonal(
        cls,
        weights: Float[Array, " K"],
        means: Float[Array, "K *event"],
        variances: Float[Array, "..."] | float,
    ) -> "GaussianMixture":
        """Independent entries with `variances`, broadcast against `means` [K, *event]."""
        log_weights, means = _check_mixture(weights, means)
        variances = jnp.asarray(variances, means.dtype)
        if variances.ndim < means.ndim:
            variances = variances.reshape((1,) * (means.ndim - variances.ndim) + variances.shape)
        is_shared = variances.shape[0] == 1
        variances = jnp.broadcast_to(variances, means.shape)
        return cls(log_weights, Moments(means, variances, StandardBasis()), True, is_shared)

    @classmethod
    def full(
        cls,
        weights: Float[Array, " K"],
        means: Float[Array, "K *event"],
        covariances: Float[Array, "K size size"],
    ) -> "GaussianMixture":
        """Each component with its own covariance; `covariances` [K, size, size]."""
        log_weights, means = _check_mixture(weights, means)
        laws = jax.vmap(Moments.dense)(means, jnp.asarray(covariances))
        return cls(log_weights, laws, False)

    @property
    def weights(self) -> Float[Array, " K"]:
        return jnp.exp(self.log_weights)

    def _each(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(component, *args)` for every component, stacked [K, ...]."""
        one = jax.vmap(
            lambda mean, eigenvalues, basis: function(Moments(mean, eigenvalues, basis), *args),
            in_axes=(0, 0, None if self.shared_basis else 0),
        )
        return one(self.components.mean, self.components.eigenvalues, self.components.basis)

    def log_responsibilities(self, x: Event, sigma: Sigma = 0.0) -> Float[Array, " K"]:
        """`log P(component | x_t = x)`."""
        if self.shared_covariance:
            # The square of x - m_k without that of x, which is the same for all.
            law, offsets = self._centred()
            precise = offsets / (law.eigenvalues + sigma**2)[None]
            products = jnp.tensordot(precise, law.basis.analyse(x - law.mean), x.ndim)
            squares = jnp.sum((precise * offsets).reshape(len(offsets), -1), 1)
            joint = self.log_weights + products - 0.5 * squares
        else:
            joint = self.log_weights + self._each(Moments.log_prob, x, sigma)
        return joint - logsumexp(joint)

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        responsibilities = jnp.exp(self.log_responsibilities(x, sigma))
        if self.shared_covariance:
            return self._mixed(responsibilities).denoise(x, sigma)
        return jnp.tensordot(responsibilities, self._each(Moments.denoise, x, sigma), 1)

    def score(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        responsibilities = jnp.exp(self.log_responsibilities(x, sigma))
        if self.shared_covariance:
            return _gaussian_score(self._mixed(responsibilities), x, sigma)
        return jnp.tensordot(responsibilities, self._each(_gaussian_score, x, sigma), 1)

    def _mixed(self, responsibilities: Float[Array, " K"]) -> Moments:
        """The shared covariance around the mean of the components with these weights."""
        mean = jnp.tensordot(responsibilities, self.components.mean, 1)
        return Moments(mean, self.components.eigenvalues[0], self.components.basis)

    def _centred(self) -> tuple[Moments, Float[Array, "K *event"]]:
        """The shared covariance in the middle of all means, and their coefficients from there."""
        means = self.components.mean
        middle = jnp.mean(means, 0)
        law = Moments(middle, self.components.eigenvalues[0], self.components.basis)
        return law, jax.vmap(law.basis.analyse)(means - middle[None])

    def log_prob(self, x: Event, sigma: Sigma = 0.0) -> Scalar:
        return logsumexp(self.log_weights + self._each(Moments.log_prob, x, sigma))

    def sample(self, key: Key) -> Event:
        which, draw = jax.random.split(key)
        k = jax.random.categorical(which, self.log_weights)
        return self._each(Moments.sample, draw)[k]

    def moments(self) -> Moments:
        means = self.components.mean
        mean = jnp.tensordot(self.weights, means, 1)
        offsets = (means - mean[None]).reshape(len(means), -1)
        within = jnp.tensordot(self.weights, self._each(Moments.covariance), 1)
        return Moments.dense(mean, within + (self.weights[:, None] * offsets).T @ offsets)

    def posterior(
        self, A: Float[Array, "m size"], y: Float[Array, " m"], cov_y: Float[Array, "m m"]
    ) -> "GaussianMixture":
        """Law of `X` given `y = A x + N(0, cov_y)`, with `A` acting on the flattened event."""
        A, y, cov_y = _check_observation(A, y, cov_y, self.components.mean[0].size)
        means, covariances = self._each(_condition, A, y, cov_y)
        joint = self.log_weights + self._each(_log_evidence, A, y, cov_y)
        return GaussianMixture.full(jax.nn.softmax(joint), means, covariances)

    def log_evidence(
        self, A: Float[Array, "m size"], y: Float[Array, " m"], cov_y: Float[Array, "m m"]
    ) -> Scalar:
        """`log p(y)` for `y = A x + N(0, cov_y)`."""
        A, y, cov_y = _check_observation(A, y, cov_y, self.components.mean[0].size)
        return logsumexp(self.log_weights + self._each(_log_evidence, A, y, cov_y))


class Empirical(AbstractExact):
    """The closed-form denoiser of a data set: a prior that needs no training.

    With bandwidth `h`, the law is the kernel density estimate `1/n sum_i N(x_i, h^2 I)`, whose
    denoiser averages the data with weights `softmax(-|x - x_i|^2 / 2(sigma^2 + h^2))`; `h = 0` is
    the empirical measure itself. `log_prob` is exact for this law.

    **Arguments:** `data` [n, *event]; `bandwidth` `h >= 0` in data units.
    """

    data: Float[Array, "n *event"] = eqx.field(converter=jnp.asarray)
    bandwidth: Scalar = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        if self.data.ndim < 1 or len(self.data) < 1:
            raise ValueError(f"data must hold events, shape [n, *event], got {self.data.shape}")
        check_finite("data", self.data)
        if self.bandwidth.ndim != 0:
            raise ValueError(f"bandwidth must be one number, got shape {self.bandwidth.shape}")
        if not is_traced(self.bandwidth) and self.bandwidth < 0:
            raise ValueError(f"bandwidth must be non-negative, got {self.bandwidth}")

    def _log_kernels(self, x: Event, variance: Scalar) -> Float[Array, " n"]:
        squares = jnp.sum((self.data - x[None]).reshape(len(self.data), -1) ** 2, 1)
        return -squares / (2 * variance)

    def _mean_of_neighbours(self, x: Event, variance: Scalar) -> Event:
        return jnp.tensordot(jax.nn.softmax(self._log_kernels(x, variance)), self.data, 1)

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        variance = sigma**2 + self.bandwidth**2
        neighbours = self._mean_of_neighbours(x, variance)
        return neighbours + self.bandwidth**2 / variance * (x - neighbours)

    def score(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        variance = sigma**2 + self.bandwidth**2
        return (self._mean_of_neighbours(x, variance) - x) / variance

    def log_prob(self, x: Event, sigma: Sigma = 0.0) -> Scalar:
        variance = sigma**2 + self.bandwidth**2
        normaliser = 0.5 * x.size * jnp.log(2 * jnp.pi * variance) + jnp.log(len(self.data))
        return logsumexp(self._log_kernels(x, variance)) - normaliser

    def effective_neighbours(self, x: Event, sigma: Sigma) -> Scalar:
        """Number of data that share the kernel weight at `x`, `1 / sum_i w_i^2`.

        Near 1, the prior repeats its data.
        """
        weights = jax.nn.softmax(self._log_kernels(x, sigma**2 + self.bandwidth**2))
        return 1 / jnp.sum(weights**2)

    def sample(self, key: Key) -> Event:
        which, draw = jax.random.split(key)
        x = self.data[jax.random.randint(which, (), 0, len(self.data))]
        return x + self.bandwidth * jax.random.normal(draw, x.shape, x.dtype)

    def moments(self) -> Moments:
        mean = self.data.mean(0)
        centred = (self.data - mean[None]).reshape(len(self.data), -1)
        covariance = centred.T @ centred / len(self.data)
        return Moments.dense(mean, covariance + self.bandwidth**2 * jnp.eye(mean.size))


class Smoothed(AbstractWrapper):
    """A denoiser averaged over perturbed inputs, `1/M sum_m D(x + h xi_m, sigma)`.

    Around `Empirical(data, 0.0)` this is the smoothed closed-form diffusion model (Scarvelis, de
    Ocariz Borde & Solomon 2023, eq. 6): samples become barycentres of `M` training points instead
    of training points. The perturbations `xi_m` come in fixed antithetic pairs, so their own mean,
    which the published average of scores adds, is zero.

    **Arguments:** `scale` `h > 0` in data units; `perturbations` `xi` [M, *event], best by `draw`.
    """

    denoiser: AbstractDenoiser
    scale: Scalar = eqx.field(converter=jnp.asarray)
    perturbations: Float[Array, "M *event"] = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        check_positive("scale", self.scale)

    @classmethod
    def draw(
        cls,
        denoiser: AbstractDenoiser,
        event_shape: tuple[int, ...],
        *,
        scale: float | Scalar,
        num_perturbations: int,
        key: Key,
    ) -> "Smoothed":
        """With standard-normal perturbations in antithetic pairs; `num_perturbations` is even."""
        if num_perturbations < 2 or num_perturbations % 2:
            raise ValueError(
                f"num_perturbations must be even and positive, got {num_perturbations}"
            )
        half = jax.random.normal(key, (num_perturbations // 2, *event_shape))
        return cls(denoiser, scale, jnp.concatenate([half, -half]))

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        inputs = x[None] + self.scale * self.perturbations
        return jnp.mean(jax.vmap(lambda z: self.denoiser(z, sigma, context))(inputs), 0)

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        """`1/M sum_m E(x + h xi_m, sigma) - h xi_m'x / sigma^2`, the last term of mean zero."""
        offsets = self.scale * self.perturbations
        energies = jax.vmap(lambda z: self.denoiser.energy(z, sigma, context))(x[None] + offsets)
        return jnp.mean(energies) - jnp.vdot(jnp.mean(offsets, 0), x) / sigma**2


def _gaussian_score(law: Moments, x: Event, sigma: Sigma) -> Event:
    return -law.apply(1 / (law.eigenvalues + sigma**2), x - law.mean)


def _condition(law: Moments, A: Array, y: Array, cov_y: Array) -> tuple[Array, Array]:
    """Mean [*event] and covariance [size, size] of `X` given `y`."""
    covariance = law.covariance()
    cross = covariance @ A.T
    gain = jnp.linalg.solve(A @ cross + cov_y, cross.T).T
    mean = law.mean + (gain @ (y - A @ law.mean.ravel())).reshape(law.mean.shape)
    # Joseph's form keeps the covariance symmetric and positive.
    residual = jnp.eye(law.size) - gain @ A
    return mean, residual @ covariance @ residual.T + gain @ cov_y @ gain.T


def _log_evidence(law: Moments, A: Array, y: Array, cov_y: Array) -> Array:
    mean, covariance = A @ law.mean.ravel(), A @ law.covariance() @ A.T + cov_y
    return jnp.asarray(jax.scipy.stats.multivariate_normal.logpdf(y, mean, covariance))


def _check_mixture(weights: Array, means: Array) -> tuple[Array, Array]:
    weights, means = jnp.asarray(weights), jnp.asarray(means)
    if weights.ndim != 1 or means.ndim < 1 or len(weights) != len(means):
        raise ValueError(
            "weights [K] and means [K, *event] must agree in K, "
            f"got {weights.shape} and {means.shape}"
        )
    if not is_traced(weights):
        values = np.asarray(weights)
        if not (np.all(values > 0) and abs(values.sum() - 1) < 1e-5):
            raise ValueError(f"weights must be positive and sum to 1, got {values}")
    return jnp.log(weights), means


def _check_observation(A: Array, y: Array, cov_y: Array, size: int) -> tuple[Array, Array, Array]:
    A, y, cov_y = jnp.asarray(A), jnp.asarray(y), jnp.asarray(cov_y)
    if A.ndim != 2 or A.shape[1] != size:
        raise ValueError(f"A must have shape [m, {size}], got {A.shape}")
    if y.shape != A.shape[:1] or cov_y.shape != (len(A), len(A)):
        raise ValueError(
            f"y and cov_y must have shapes {A.shape[:1]} and {(len(A), len(A))}, "
            f"got {y.shape} and {cov_y.shape}"
        )
    return A, y, cov_y


__all__ = ["AbstractExact", "Empirical", "Gaussian", "GaussianMixture", "Smoothed"]
