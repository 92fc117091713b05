"""Quantiles and tails of laws of one number, in terms of a standard normal variable.

Both tails are computed each on its own side, as `log F` and `log (1 - F)`, because `1 - F` rounds
to zero at `z = 5.4` in single precision and at `z = 8.3` in double. A law of its own kind joins by
`quantile.register` and `log_tails.register`.
"""

import math
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtr, ndtri

from scoreprior._typing import Array

LOG_2, LOG_SQRT_2_PI = math.log(2), math.log(2 * math.pi) / 2


@singledispatch
def quantile(law: Any, z: Array) -> Array:
    """`F^-1(Phi(z))`."""
    return law.icdf(ndtr(z))


@singledispatch
def log_tails(law: Any, theta: Array) -> tuple[Array, Array]:
    """`log F(theta)` and `log (1 - F(theta))`."""
    below = law.cdf(theta)
    return jnp.log(below), jnp.log1p(-below)


@singledispatch
def normal_score(law: Any, theta: Array) -> Array:
    """`Phi^-1(F(theta))`."""
    return smaller_tail(*log_tails(law, theta))


def from_survival(log_survival: Array) -> tuple[Array, Array]:
    """Both tails, from the upper one."""
    return jnp.log(-jnp.expm1(log_survival)), log_survival


def log_above(z: Array) -> Array:
    """`log (1 - Phi(z))`, precise as a relative error on both sides."""
    # The branch that is not taken must stay finite: its derivative is multiplied by zero.
    below = jnp.log1p(-ndtr(jnp.where(z < 0, z, 0.0)))
    return jnp.where(z < 0, below, log_ndtr(-z))


def mirrored(law: Any, z: Array, lower: Callable[[Array], Array]) -> Array:
    """Quantiles of a law symmetric about `loc`; `lower` maps `log p <= log 1/2` to them."""
    standard = lower(log_ndtr(jnp.where(z < 0, z, -z)))
    return law.loc + law.scale * jnp.where(z < 0, standard, -standard)


def both_tails(law: Any, theta: Array, tail: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Tails of a law symmetric about `loc`; `tail` is `log (1 - F)` of the standard one, s >= 0."""
    s = (theta - law.loc) / law.scale
    small = tail(jnp.where(s < 0, -s, s))
    large = jnp.log1p(-jnp.exp(small))
    return jnp.where(s < 0, small, large), jnp.where(s < 0, large, small)


def smaller_tail(log_below: Array, log_above: Array) -> Array:
    """`Phi^-1(F)`, from the smaller of the two tails."""
    is_below = log_below < log_above
    score = log_ndtri(jnp.where(is_below, log_below, log_above))
    return jnp.where(is_below, score, -score)


@jax.custom_jvp
def log_ndtri(log_p: Array) -> Array:
    """`Phi^-1(exp(log_p))`, also where `exp(log_p)` underflows."""
    lowest = math.log(float(jnp.finfo(log_p.dtype).tiny)) / 2
    far = jnp.where((log_p < lowest) & (log_p > -jnp.inf), log_p, lowest)
    x = -jnp.sqrt(-2 * far)
    # Newton's method on log Phi, which is nearly a parabola there.
    for _ in range(4):
        x = x - (log_ndtr(x) - far) * jnp.exp(log_ndtr(x) - log_normal(x))
    x = jnp.where(log_p < lowest, x, ndtri(jnp.exp(jnp.maximum(log_p, lowest))))
    return jnp.where(log_p == -jnp.inf, -jnp.inf, x)


@log_ndtri.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    x = log_ndtri(*primals)
    slope = jnp.exp(primals[0] - log_normal(x))
    return x, jnp.where(primals[0] == -jnp.inf, jnp.inf, slope) * tangents[0]


def log_normal(z: Array) -> Array:
    """`log N(z; 0, 1)`."""
    return -0.5 * z**2 - LOG_SQRT_2_PI
