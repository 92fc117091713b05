"""The uniform law on a box, with soft edges or hard ones, and the truncated normal laws of both."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from scoreprior._typing import Array, Context, Event, Float, Key, Scalar, Sigma
from scoreprior._util import check_finite, is_traced
from scoreprior.denoise.exact import AbstractExact
from scoreprior.gaussian import Moments

# Integrands are followed down to exp(-depth) of their peak, by so many nodes: enough for each.
SINGLE, DOUBLE = (20.0, 24), (40.0, 40)
LOG_SQRT_2_PI = math.log(2 * math.pi) / 2


class Uniform(AbstractExact):
    """Independent entries, uniform between `low` and `high`.

    With `a = (low - x)/sigma` and `b = (high - x)/sigma` for each entry, `Phi` the standard normal
    distribution function and `phi` its density,

        p_sigma(x) = (Phi(b) - Phi(a)) / (high - low),
        D(x, sigma) = x + sigma (phi(a) - phi(b)) / (Phi(b) - Phi(a)),

    the mean of `N(x, sigma^2)` truncated to `[low, high]`. Neither is computed as it stands, but by
    sums of positive terms: they keep their precision, and so do their derivatives, on the edges,
    any number of `sigma` outside, and for `sigma` much larger or smaller than the box. At
    `sigma = 0`, `D` is the nearest point of the box, and the score outside it is infinite.

    **Arguments:** `low` and `high` [*event] in data units, `low < high` in every entry.
    """

    low: Event = eqx.field(converter=lambda value: _floating(value))
    high: Event = eqx.field(converter=lambda value: _floating(value))

    def __check_init__(self):
        if self.low.shape != self.high.shape:
            raise ValueError(
                f"high must have the shape of low, {self.low.shape}, got {self.high.shape}"
            )
        check_finite("low", self.low)
        check_finite("high", self.high)
        width = self.high - self.low
        if not is_traced(width) and not jnp.all(width > 0):
            raise ValueError(f"high must exceed low, got a difference of {float(jnp.min(width)):g}")

    def _truncated(self, x: Event, sigma: Sigma) -> "Truncated":
        return truncated_normal(self.low, self.high, x, jnp.where(sigma > 0, sigma, 1.0))

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        nearest = jnp.clip(x, self.low, self.high)
        return jnp.where(sigma > 0, self._truncated(x, sigma).mean, nearest)

    def score(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        outside = jnp.sign(jnp.clip(x, self.low, self.high) - x)
        at_zero = jnp.where(outside == 0, 0.0, outside * jnp.inf)
        return jnp.where(sigma > 0, self._truncated(x, sigma).slope, at_zero)

    def log_prob(self, x: Event, sigma: Sigma = 0.0) -> Scalar:
        is_inside = (x >= self.low) & (x <= self.high)
        at_zero = jnp.where(is_inside, 0.0, -jnp.inf)
        log_mass = jnp.where(sigma > 0, self._truncated(x, sigma).log_mass, at_zero)
        return jnp.sum(log_mass - jnp.log(self.high - self.low))

    def covariance(self, x: Event, sigma: Sigma) -> Float[Array, "size size"]:
        variance = jnp.where(sigma > 0, self._truncated(x, sigma).variance, 0.0)
        return jnp.diag(variance.ravel())

    def sample(self, key: Key) -> Event:
        share = jax.random.uniform(key, self.low.shape, self.low.dtype)
        return self.low + (self.high - self.low) * share

    def moments(self) -> Moments:
        return Moments((self.low + self.high) / 2, (self.high - self.low) ** 2 / 12)


class BlurredUniform(AbstractExact):
    """Independent entries `U + blur N(0, 1)`, `U` uniform between `low` and `high`.

    A box with soft edges: with noise `sigma` it is the box of `Uniform` with noise of variance
    `sigma^2 + blur^2`. Where `low = high` it is `N(low, blur^2)`. Methods take a noise level
    [*event] too, one for each entry.

    **Arguments:** `low <= high` and `blur > 0`, [*event] each.
    """

    low: Event = eqx.field(converter=lambda value: _floating(value))
    high: Event = eqx.field(converter=lambda value: _floating(value))
    blur: Event = eqx.field(converter=lambda value: _floating(value))

    def __check_init__(self):
        if not self.low.shape == self.high.shape == self.blur.shape:
            raise ValueError(
                f"high and blur must have the shape of low, {self.low.shape}, got "
                f"{self.high.shape} and {self.blur.shape}"
            )
        for name in ("low", "high", "blur"):
            check_finite(name, getattr(self, name))
        width = self.high - self.low
        if not is_traced(width) and not jnp.all(width >= 0):
            raise ValueError(
                f"high must not be below low, got a difference of {float(jnp.min(width)):g}"
            )
        if not is_traced(width) and not jnp.all(self.blur > 0):
            raise ValueError(f"blur must be positive, got {float(jnp.min(self.blur)):g}")

    @property
    def _is_point(self) -> Array:
        return self.high == self.low

    def _truncated(self, x: Event, sigma: Sigma | Event) -> tuple["Truncated", Array]:
        above = jnp.sqrt(sigma**2 + self.blur**2)
        # A box of no width has no density; what stands for it is not used.
        high = jnp.where(self._is_point, self.low + 1, self.high)
        return truncated_normal(self.low, high, x, above), above

    def __call__(self, x: Event, sigma: Sigma | Event, context: Context = None) -> Event:
        box, above = self._truncated(x, sigma)
        middle = jnp.where(self._is_point, self.low, box.mean)
        return (sigma / above) ** 2 * middle + (self.blur / above) ** 2 * x

    def score(self, x: Event, sigma: Sigma | Event, context: Context = None) -> Event:
        box, above = self._truncated(x, sigma)
        return jnp.where(self._is_point, (self.low - x) / above**2, box.slope)

    def log_prob(self, x: Event, sigma: Sigma | Event = 0.0) -> Scalar:
        box, above = self._truncated(x, sigma)
        width = jnp.where(self._is_point, 1.0, self.high - self.low)
        normal = -(((x - self.low) / above) ** 2) / 2 - jnp.log(above) - LOG_SQRT_2_PI
        return jnp.sum(jnp.where(self._is_point, normal, box.log_mass - jnp.log(width)))

    def variance(self, x: Event, sigma: Sigma | Event) -> Event:
        """Variance of every entry of the clean event given the noisy one."""
        box, above = self._truncated(x, sigma)
        spread = jnp.where(self._is_point, 0.0, box.variance)
        return (sigma * self.blur / above) ** 2 + (sigma / above) ** 4 * spread

    def covariance(self, x: Event, sigma: Sigma | Event) -> Float[Array, "size size"]:
        return jnp.diag(self.variance(x, sigma).ravel())

    def sample(self, key: Key) -> Event:
        box, normal = jax.random.split(key)
        share = jax.random.uniform(box, self.low.shape, self.low.dtype)
        noise = self.blur * jax.random.normal(normal, self.low.shape, self.low.dtype)
        return self.low + (self.high - self.low) * share + noise

    def moments(self) -> Moments:
        variance = (self.high - self.low) ** 2 / 12 + self.blur**2
        return Moments((self.low + self.high) / 2, variance)


class Truncated(NamedTuple):
    """`N(x, sigma^2)` truncated to an interval, entry by entry."""

    log_mass: Array
    """Logarithm of the probability of the interval under `N(x, sigma^2)`."""
    slope: Array
    """Derivative of `log_mass` in `x`."""
    mean: Array
    variance: Array


def truncated_normal(low: Array, high: Array, x: Array, sigma: Any) -> Truncated:
    """`N(x, sigma^2)` truncated to `[low, high]`, which may be infinite on either side.

    Gauss-Legendre quadrature in `tau = (X - mode)/sigma`, with `mode` the point of the interval
    nearest to `x`, from where the density falls on both sides, as `exp(-tau^2/2 - n tau)` with
    `n = (mode - x)/sigma`.
    """
    # The results depend on neither mode nor reach, which are there to compute them well.
    mode = jax.lax.stop_gradient(jnp.clip(x, low, high))
    depth, num_nodes = DOUBLE if mode.dtype == jnp.float64 else SINGLE
    n = (mode - x) / sigma
    steep = jnp.abs(n)
    reach = jax.lax.stop_gradient(2 * depth / (steep + jnp.sqrt(steep**2 + 2 * depth)))
    first = jnp.maximum((low - mode) / sigma, -reach)
    last = jnp.minimum((high - mode) / sigma, reach)
    middle, half = (first + last) / 2, (last - first) / 2
    # [*event, num_nodes]
    rule, shape = np.polynomial.legendre.leggauss(num_nodes), (*half.shape, num_nodes)
    nodes, weights = (jnp.broadcast_to(jnp.asarray(a, half.dtype), shape) for a in rule)
    tau = middle[..., None] + half[..., None] * nodes
    masses = weights * jnp.exp(-tau * (tau / 2 + n[..., None]))
    total = jnp.sum(masses, -1)
    shares = masses / total[..., None]
    centre = jnp.sum(shares * nodes, -1)
    spread = jnp.sum(shares * (nodes - centre[..., None]) ** 2, -1)
    offset = middle + half * centre
    log_mass = jnp.log(half * total) - n**2 / 2 - LOG_SQRT_2_PI
    return Truncated(
        log_mass, (n + offset) / sigma, mode + sigma * offset, (sigma * half) ** 2 * spread
    )


def _floating(value: Any) -> Array:
    return jnp.asarray(value, jnp.result_type(value, float))


__all__ = ["BlurredUniform", "Uniform"]
