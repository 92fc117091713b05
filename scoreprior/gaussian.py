"""Structured Gaussian approximations of a data set.

`Moments` is `N(m, C)` with `C = R diag(lam) R'`, in an orthonormal basis `R` where `C` is
diagonal. It whitens data at any noise level: with `a(sigma) = sqrt(lam + sigma^2)`,

    u = diag(1 / a(sigma)) R' (x - m),      x = m + R diag(a(sigma)) u,

so that `u ~ N(0, I)` when `x ~ N(m, C + sigma^2 I)`. Nothing here says that the data *are*
Gaussian; `denoise.Gaussian` is the denoiser for data that are.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreprior._typing import Event, Key, Scalar, Sigma
from scoreprior._util import check_count, check_data, is_traced, size_of


class AbstractBasis(eqx.Module):
    """An orthonormal change of coordinates that keeps the shape of an event."""

    @abstractmethod
    def analyse(self, x: Event) -> Event:
        """Coefficients `R' x`."""

    @abstractmethod
    def synthesise(self, coefficients: Event) -> Event:
        """The event `R c` with these coefficients."""


class StandardBasis(AbstractBasis):
    """`R = I`: the entries of an event are its coefficients."""

    def analyse(self, x: Event) -> Event:
        return x

    def synthesise(self, coefficients: Event) -> Event:
        return coefficients


class Eigenbasis(AbstractBasis):
    """`R` given by its columns, `vectors` [size, size], acting on the flattened event."""

    vectors: Float[Array, "*batch size size"] = eqx.field(converter=jnp.asarray)

    def analyse(self, x: Event) -> Event:
        return (x.ravel() @ self.vectors).reshape(x.shape)

    def synthesise(self, coefficients: Event) -> Event:
        return (self.vectors @ coefficients.ravel()).reshape(coefficients.shape)


class HartleyBasis(AbstractBasis):
    """Discrete Hartley transform along `axes`: real, orthonormal, its own inverse.

    `R'x = (Re F - Im F)(x) / sqrt(n)` with `F` the discrete Fourier transform. It diagonalises
    the covariance of every real stationary periodic field (Bracewell, J. Opt. Soc. Am. 73, 1983).
    """

    axes: tuple[int, ...] = eqx.field(static=True)

    def analyse(self, x: Event) -> Event:
        transformed = jnp.fft.fftn(x, axes=self.axes, norm="ortho")
        return transformed.real - transformed.imag

    def synthesise(self, coefficients: Event) -> Event:
        return self.analyse(coefficients)


class KroneckerBasis(AbstractBasis):
    """`R = Q_1 x Q_2 x ...`, one orthogonal matrix for each axis of an event.

    Acts as `c_ab = sum_ij Q1_ia Q2_jb x_ij`: for an image of n x n pixels 2 n^3 products and 2 n^2
    numbers, where an `Eigenbasis` takes n^4 of both.

    **Arguments:** `factors`, matrices [n_axis, n_axis] given by their columns.
    """

    factors: tuple[Float[Array, "..."], ...] = eqx.field(
        converter=lambda factors: tuple(jnp.asarray(factor) for factor in factors)
    )

    def analyse(self, x: Event) -> Event:
        # Each product moves the first axis to the end: after all of them the order is as before.
        for factor in self.factors:
            x = jnp.tensordot(x, factor, (0, 0))
        return x

    def synthesise(self, coefficients: Event) -> Event:
        for factor in self.factors:
            coefficients = jnp.tensordot(coefficients, factor, (0, 1))
        return coefficients


class HouseholderBasis(AbstractBasis):
    """`R = I - V T V'`, the product of `r` reflections of the flattened event.

    Its first `r` columns are any that one wants, and what the others are does not matter where
    their eigenvalues are equal: the basis of a low-rank covariance, at 4 r products per entry of an
    event instead of the square of its size (Schreiber & Van Loan, SIAM J. Sci. Stat. Comput. 10,
    1989). Build one with `along`.

    **Arguments:** `vectors` `V` [size, r], `triangle` `T` [r, r].
    """

    vectors: Float[Array, "size r"] = eqx.field(converter=jnp.asarray)
    triangle: Float[Array, "r r"] = eqx.field(converter=jnp.asarray)

    @classmethod
    def along(cls, columns: Float[Array, "size r"]) -> "HouseholderBasis":
        """With orthonormal `columns`, up to their signs, as the first of `R`."""
        raw, tau = jnp.linalg.qr(columns, mode="raw")
        vectors = jnp.tril(raw.T, -1) + jnp.eye(*columns.shape, dtype=raw.dtype)
        products = jnp.triu(vectors.T @ vectors, 1)
        identity = jnp.eye(len(tau), dtype=raw.dtype)
        return cls(vectors, jnp.linalg.solve(identity + tau[:, None] * products, jnp.diag(tau)))

    def analyse(self, x: Event) -> Event:
        return x - (self.vectors @ ((x.ravel() @ self.vectors) @ self.triangle)).reshape(x.shape)

    def synthesise(self, coefficients: Event) -> Event:
        inner = self.triangle @ (coefficients.ravel() @ self.vectors)
        return coefficients - (self.vectors @ inner).reshape(coefficients.shape)


class Moments(eqx.Module):
    """Gaussian approximation `N(m, R diag(lam) R')` of data of shape `[*event]`.

    **Arguments:** `mean` [*event] in data units; `eigenvalues` [*event], non-negative, in data
    units squared; `basis`, the orthonormal `R`. Build one from data with `Moments.fit`.
    """

    mean: Event = eqx.field(converter=jnp.asarray)
    eigenvalues: Event = eqx.field(converter=jnp.asarray)
    basis: AbstractBasis = StandardBasis()

    def __check_init__(self):
        shapes = jnp.shape(self.mean), jnp.shape(self.eigenvalues)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"eigenvalues must have the shape of mean, {shapes[0]}, got {shapes[1]}"
            )
        if is_traced(self.eigenvalues):
            return
        values = np.asarray(self.eigenvalues)
        if not np.all(values >= 0):
            raise ValueError(f"eigenvalues must not be negative or NaN, got {values.min():g}")

    @classmethod
    def dense(cls, mean: Event, covariance: Float[Array, "size size"]) -> "Moments":
        """`N(mean, covariance)`, the covariance acting on the flattened event.

        Eigenvalues that are negative by no more than rounding are set to zero.
        """
        mean, covariance = jnp.asarray(mean), jnp.asarray(covariance)
        if covariance.shape != (mean.size, mean.size):
            raise ValueError(
                f"covariance must have shape {(mean.size, mean.size)} for events of shape "
                f"{mean.shape}, got {covariance.shape}"
            )
        values, vectors = _eigh(covariance)
        return cls(mean, values.reshape(mean.shape), Eigenbasis(vectors))

    @classmethod
    def low_rank(
        cls, mean: Event, factor: Float[Array, "size r"], variance: float | Scalar
    ) -> "Moments":
        """`N(mean, W W' + variance I)` with `factor` `W` of fewer columns than rows.

        In a `HouseholderBasis`: nothing of the square of the size is stored or computed.
        """
        mean, factor = jnp.asarray(mean), jnp.asarray(factor)
        if factor.ndim != 2 or len(factor) != mean.size or factor.shape[1] >= mean.size:
            raise ValueError(
                f"factor must have {mean.size} rows and fewer columns for events of shape "
                f"{mean.shape}, got shape {factor.shape}"
            )
        columns, values, _ = jnp.linalg.svd(factor, full_matrices=False)
        return cls._along(mean, columns, values**2 + variance, variance)

    @classmethod
    def _along(cls, mean: Event, columns: Array, values: Array, rest: Any) -> "Moments":
        """Eigenvalues `values` [r] along `columns` [size, r], and `rest` everywhere else."""
        eigenvalues = jnp.full(mean.size, rest, values.dtype).at[: len(values)].set(values)
        return cls(mean, eigenvalues.reshape(mean.shape), HouseholderBasis.along(columns))

    @classmethod
    def fit(cls, data: Float[Array, "n *event"], structure: "AbstractStructure") -> "Moments":
        """Fit to `data` [n, *event].

        `structure` of the covariance: `Isotropic()`, `Diagonal()`, `Dense()`, `LowRank(rank)`,
        `Fourier(axes)` or `Separable()`.
        """
        data = jnp.asarray(data)
        check_data("data", data)
        return structure.fit(data)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.mean)

    @property
    def size(self) -> int:
        """Number of entries of one event."""
        return size_of(self.event_shape)

    def scales(self, sigma: Sigma) -> Event:
        """`a(sigma) = sqrt(lam + sigma^2)`, the standard deviations of noisy data, [*event]."""
        return jnp.sqrt(self.eigenvalues + sigma**2)

    def whiten(self, x: Event, sigma: Sigma) -> Event:
        """`u = diag(1/a) R' (x - m)`."""
        return self.basis.analyse(x - self.mean) / self.scales(sigma)

    def colour(self, u: Event, sigma: Sigma) -> Event:
        """`x = m + R diag(a) u`, the inverse of `whiten`."""
        return self.mean + self.basis.synthesise(self.scales(sigma) * u)

    def log_det(self, sigma: Sigma) -> Scalar:
        """`sum_i log a_i(sigma)`: log-determinant of `colour`."""
        return jnp.sum(jnp.log(self.scales(sigma)))

    def apply(self, function_of_eigenvalues: Event, x: Event) -> Event:
        """`R diag(f) R' x`, for `f` [*event] one number per coefficient."""
        return self.basis.synthesise(function_of_eigenvalues * self.basis.analyse(x))

    def denoise(self, x: Event, sigma: Sigma) -> Event:
        """`m + C (C + sigma^2 I)^-1 (x - m)`: the denoiser if the data were Gaussian."""
        shrink = self.eigenvalues / (self.eigenvalues + sigma**2)
        return self.mean + self.apply(shrink, x - self.mean)

    def log_prob(self, x: Event, sigma: Sigma = 0.0) -> Scalar:
        """Log density of `N(m, C + sigma^2 I)` at one event."""
        u = self.whiten(x, sigma)
        return -0.5 * (jnp.sum(u**2) + self.size * jnp.log(2 * jnp.pi)) - self.log_det(sigma)

    def sample(self, key: Key, sigma: Sigma = 0.0) -> Event:
        """One draw from `N(m, C + sigma^2 I)`."""
        return self.colour(jax.random.normal(key, self.event_shape, self.mean.dtype), sigma)

    def covariance(self) -> Float[Array, "size size"]:
        """`C` as a dense matrix over flattened events."""
        basis = jnp.eye(self.size, dtype=self.mean.dtype).reshape(self.size, *self.event_shape)
        columns = jax.vmap(lambda e: self.apply(self.eigenvalues, e))(basis)
        return columns.reshape(self.size, self.size).T


class AbstractStructure(eqx.Module):
    """What is assumed of a covariance: how `Moments` are estimated from data."""

    @abstractmethod
    def fit(self, data: Float[Array, "n *event"]) -> Moments:
        """Estimate the moments of `data` [n, *event]."""


class Isotropic(AbstractStructure):
    """`C = s^2 I`, with `s^2` the mean variance of the entries."""

    def fit(self, data: Float[Array, "n *event"]) -> Moments:
        mean = data.mean(0)
        return Moments(mean, jnp.full_like(mean, jnp.mean((data - mean[None]) ** 2)))


class Diagonal(AbstractStructure):
    """Independent entries, each with its own variance."""

    def fit(self, data: Float[Array, "n *event"]) -> Moments:
        return Moments(data.mean(0), data.var(0))


class Dense(AbstractStructure):
    """Full covariance in its eigenbasis, shrunk towards `tr(C)/d I`.

    `shrinkage` in [0, 1] is the weight of the isotropic target; `None` takes the Ledoit-Wolf
    estimate (J. Multivariate Anal. 88, 2004), which makes a singular sample covariance positive
    definite and vanishes as `n` grows.
    """

    shrinkage: float | None = None

    def __check_init__(self):
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in [0, 1] or be None, got {self.shrinkage}")

    def fit(self, data: Float[Array, "n *event"]) -> Moments:
        mean = data.mean(0)
        centred = (data - mean[None]).reshape(len(data), -1)
        sample = centred.T @ centred / len(data)
        target = jnp.trace(sample) / mean.size * jnp.eye(mean.size, dtype=data.dtype)
        weight = _ledoit_wolf(centred, sample, target) if self.shrinkage is None else self.shrinkage
        return Moments.dense(mean, (1 - weight) * sample + weight * target)


class LowRank(AbstractStructure):
    """`W W' + s^2 I` with `rank` columns: probabilistic principal components.

    The maximum of the likelihood, in closed form: the `rank` largest eigenvalues of the sample
    covariance are kept, and the others replaced by their mean (Tipping & Bishop, J. R. Stat. Soc. B
    61, 1999, eqs. 7 and 8). In a `HouseholderBasis`: with fewer data than entries of an event,
    time and memory are linear in its size, so that it serves large images.
    """

    rank: int

    def __check_init__(self):
        check_count("rank", self.rank)

    def fit(self, data: Float[Array, "n *event"]) -> Moments:
        mean = data.mean(0)
        if self.rank >= min(mean.size, len(data)):
            raise ValueError(
                f"rank must be below the size of an event, {mean.size}, and the number of data, "
                f"{len(data)}, got {self.rank}"
            )
        centred = (data - mean[None]).reshape(len(data), -1)
        if len(data) < mean.size:
            _, deviations, rows = jnp.linalg.svd(centred, full_matrices=False)
            values, vectors = deviations[::-1] ** 2 / len(data), rows[::-1].T
        else:
            values, vectors = _eigh(centred.T @ centred / len(data))
        rest = jnp.sum(values[: -self.rank]) / (mean.size - self.rank)
        return Moments._along(mean, vectors[:, -self.rank :], values[-self.rank :], rest)


class Fourier(AbstractStructure):
    """Stationary and periodic along `axes`, all of them when `None`: one mean and spectrum each.

    Remaining axes, such as colour channels, are taken as independent, each with its own mean and
    spectrum.
    """

    axes: tuple[int, ...] | None = None

    def fit(self, data: Float[Array, "n *event"]) -> Moments:
        ndim = data.ndim - 1
        axes = tuple(range(ndim)) if self.axes is None else tuple(a % ndim for a in self.axes)
        basis = HartleyBasis(axes)
        mean = jnp.mean(data, axis=(0, *(a + 1 for a in axes)), keepdims=True)[0]
        mean = jnp.broadcast_to(mean, data.shape[1:])
        power = jnp.mean(jax.vmap(basis.analyse)(data - mean[None]) ** 2, axis=0)
        # The spectrum of a real field is even; averaging k and -k uses that.
        reflected = jnp.roll(jnp.flip(power, axes), 1, axes)
        return Moments(mean, (power + reflected) / 2, basis)


class Separable(AbstractStructure):
    """Uncorrelated in a `KroneckerBasis`: that of the covariances along each axis.

    `Q_axis` are the eigenvectors of the covariance of entries along that axis, averaged over all
    others, the largest first, and the eigenvalues are the variances of the coefficients. Exact for
    a covariance that is a Kronecker product; any other loses its correlations in this basis (De
    Lathauwer, De Moor & Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000, section 3).
    """

    def fit(self, data: Float[Array, "n *event"]) -> Moments:
        mean = data.mean(0)
        if mean.ndim < 1:
            raise ValueError(f"data must have at least one axis per event, got shape {data.shape}")
        centred = data - mean[None]
        factors = []
        for axis in range(1, data.ndim):
            rows = jnp.moveaxis(centred, axis, 0).reshape(data.shape[axis], -1)
            factors.append(jnp.linalg.eigh(rows @ rows.T)[1][:, ::-1])
        basis = KroneckerBasis(tuple(factors))
        return Moments(mean, jnp.mean(jax.vmap(basis.analyse)(centred) ** 2, 0), basis)


def _ledoit_wolf(centred: Array, sample: Array, target: Array) -> Array:
    """Weight of `target` with the least expected Frobenius error (Ledoit & Wolf 2004, eq. 14)."""
    n = len(centred)
    spread = jnp.sum((sample - target) ** 2)
    noise = (jnp.mean(jnp.sum(centred**2, 1) ** 2) - jnp.sum(sample**2)) / n
    return jnp.where(spread > 0, jnp.minimum(noise, spread) / jnp.where(spread > 0, spread, 1), 0.0)


def _eigh(covariance: Float[Array, "size size"]) -> tuple[Float[Array, " size"], Array]:
    """Eigenvalues in ascending order, and vectors; those negative by rounding are zero."""
    values, vectors = jnp.linalg.eigh(covariance)
    largest, eps = jnp.max(jnp.abs(values)), jnp.finfo(values.dtype).eps
    asymmetry = jnp.max(jnp.abs(covariance - covariance.T))
    if not is_traced(asymmetry) and not asymmetry <= jnp.sqrt(eps) * largest:
        raise ValueError(
            f"covariance must be symmetric, got entries that differ by {float(asymmetry):g} "
            "from their mirror images"
        )
    is_rounding = jnp.abs(values) <= 10 * len(values) * eps * largest
    return jnp.where(is_rounding, jnp.maximum(values, 0), values), vectors
