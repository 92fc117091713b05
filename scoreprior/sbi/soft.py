"""The distribution function of `U(-HALF, HALF) + BLUR N(0, 1)`, its density and its inverse.

A blurred box, of mean zero and variance one: `transforms.SoftUniform` has it for coordinates.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr

from scoreprior._typing import Array
from scoreprior.sbi.tails import log_normal

BLUR = 0.1
"""In standard deviations of the prior. Measured: tasks with uniform priors like 0.05 to 0.2."""

HALF = math.sqrt(3 * (1 - BLUR**2))
SHARE = BLUR / (2 * HALF)
FAR, NUM_STEPS = -3.0, 20
NODES, WEIGHTS = np.polynomial.laguerre.laggauss(24)


def share_of(z: Array) -> Array:
    """The share of the box between `theta` and the nearer end."""
    return SHARE * jnp.exp(log_ramp(_depth(z)))


def from_share(share: Array) -> Array:
    """`z` in the lower half, from what lies below."""
    return BLUR * inverse_log_ramp(jnp.log(share / SHARE)) - HALF


def log_density(z: Array) -> Array:
    """Of the blurred box."""
    return log_ndtr(_depth(z)) - math.log(2 * HALF)


def _depth(z: Array) -> Array:
    """How far inside the nearer edge, in units of `BLUR`; that of the other is too far to count."""
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


__all__ = ["BLUR", "HALF", "from_share", "log_density", "share_of"]
