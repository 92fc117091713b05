"""Coordinates of a uniform law that are straight inside the box and soft at its edges.

`theta = F^-1_uniform(F(z))` with `F` the distribution function of `U(-HALF, HALF) + BLUR N(0, 1)`:
the prior of `z` is a blurred box, of mean zero and variance one, whose noised law is known
(`denoise.BlurredUniform`). In Gaussian coordinates a likelihood of one width everywhere has a width
that depends on where it is, and a network must learn that; here it does not, but for `BLUR` of the
edges.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import log_ndtr, ndtr
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from scoreprior._typing import Array
from scoreprior.sbi.tails import log_normal

BLUR = 0.1
"""In standard deviations of the prior. Measured: tasks with uniform priors like 0.05 to 0.2."""

HALF = math.sqrt(3 * (1 - BLUR**2))
SHARE = BLUR / (2 * HALF)
FAR, NUM_STEPS = -3.0, 20
NODES, WEIGHTS = np.polynomial.laguerre.laggauss(24)


class SoftUniform(Transform):
    """The bijection from `z` of law `U(-HALF, HALF) + BLUR N(0, 1)` to the uniform `law`.

    The inverse is infinite at the ends of the support and NaN beyond them. Where `theta` is too
    close to an end for its dtype, it rounds to the end, and the way back is infinite.

    **Arguments:** `law`, a `Uniform` of any batch shape.
    """

    domain = constraints.real

    def __init__(self, law: dist.Uniform):
        self.law = law

    @property
    def codomain(self) -> Any:
        return self.law.support

    @property
    def sign(self) -> float:
        return 1.0

    def __call__(self, x: Any) -> Array:
        part = (self.law.high - self.law.low) * SHARE * jnp.exp(log_ramp(_depth(x)))
        return jnp.where(x < 0, self.law.low + part, self.law.high - part)

    def _inverse(self, y: Any) -> Array:
        width = self.law.high - self.law.low
        is_low = y - self.law.low < self.law.high - y
        share = jnp.where(is_low, y - self.law.low, self.law.high - y) / width
        z = BLUR * inverse_log_ramp(jnp.log(share / SHARE)) - HALF
        return jnp.where(self.law.support(y), jnp.where(is_low, z, -z), jnp.nan)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Array:
        width = self.law.high - self.law.low
        return log_ndtr(_depth(x)) - math.log(2 * HALF) + jnp.log(width)

    def tree_flatten(self) -> Any:
        return (self.law,), (("law",), {})

    def eq(self, other: object, static: bool = False) -> Any:
        if not isinstance(other, SoftUniform):
            return False
        mine, its = ((t.law.low, t.law.high) for t in (self, other))
        same = [jnp.array_equal(a, b) for a, b in zip(mine, its, strict=True)]
        return all(map(bool, same)) if static else jnp.all(jnp.array(same))


def _depth(z: Any) -> Array:
    """How far inside the nearer edge, in units of `BLUR`; that of the other is too far to count."""
    z = jnp.asarray(z, jnp.result_type(z, float))
    return (HALF + jnp.where(z < 0, z, -z)) / BLUR


@jax.custom_jvp
def log_ramp(t: Array) -> Array:
    """`log` of the integral of `Phi` up to `t`, `phi(t) + t Phi(t)`.

    Far below zero these cancel; there it is `phi(t) / t^2` times the integral of
    `v exp(-v - v^2 / (2 t^2))`, by Gauss-Laguerre quadrature.
    """
    near, far = jnp.maximum(t, FAR), jnp.minimum(t, FAR)
    nodes, weights = (jnp.asarray(a, t.dtype) for a in (NODES, WEIGHTS * NODES))
    total = jnp.sum(weights * jnp.exp(-((nodes / far[..., None]) ** 2) / 2), -1)
    at_far = log_normal(far) - 2 * jnp.log(-far) + jnp.log(total)
    return jnp.where(t < FAR, at_far, jnp.log(jnp.exp(log_normal(near)) + near * ndtr(near)))


@log_ramp.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (t,), (dt,) = primals, tangents
    value = log_ramp(t)
    return value, jnp.exp(log_ndtr(t) - value) * dt


@jax.custom_jvp
def inverse_log_ramp(y: Array) -> Array:
    """`t` with `log_ramp(t) = y`, by Newton's method, which is safe since `log_ramp` is concave."""

    def step(_: Any, t: Array) -> Array:
        value = log_ramp(t)
        return t - (value - y) * jnp.exp(value - log_ndtr(t))

    start = jnp.where(y == -jnp.inf, 0.0, jnp.exp(y))
    t = jax.lax.fori_loop(0, NUM_STEPS, step, start.astype(y.dtype))
    return jnp.where(y == -jnp.inf, -jnp.inf, t)


@inverse_log_ramp.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (y,), (dy,) = primals, tangents
    t = inverse_log_ramp(y)
    return t, jnp.exp(y - log_ndtr(t)) * dy


__all__ = ["BLUR", "HALF", "SoftUniform"]
