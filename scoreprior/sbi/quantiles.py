"""Quantiles and tails of the laws of one number that NumPyro has: see `tails`."""

import math
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.custom_derivatives import SymbolicZero
from jax.scipy.special import betainc, betaln, erf, erfinv, gammainc, gammaincc, log_ndtr, ndtr

from scoreprior._typing import Array
from scoreprior.denoise.uniform import truncated_normal
from scoreprior.sbi.tails import (
    LOG_2,
    both_tails,
    from_survival,
    log_above,
    log_ndtri,
    log_normal,
    log_tails,
    mirrored,
    normal_score,
    quantile,
    smaller_tail,
)

MAX_STEPS, FAR = 100, 0.1
Truncated = (
    dist.LeftTruncatedDistribution
    | dist.RightTruncatedDistribution
    | dist.TwoSidedTruncatedDistribution
)


@quantile.register(dist.Uniform)
def _(law: dist.Uniform, z: Array) -> Array:
    width = law.high - law.low
    return jnp.where(z < 0, law.low + width * ndtr(z), law.high - width * ndtr(-z))


@log_tails.register(dist.Uniform)
def _(law: dist.Uniform, theta: Array) -> tuple[Array, Array]:
    width = law.high - law.low
    return jnp.log((theta - law.low) / width), jnp.log((law.high - theta) / width)


# Laws known by their survival function S = 1 - F.


@quantile.register(dist.Exponential)
def _(law: dist.Exponential, z: Array) -> Array:
    return -log_above(z) / law.rate


@log_tails.register(dist.Exponential)
def _(law: dist.Exponential, theta: Array) -> tuple[Array, Array]:
    return from_survival(-law.rate * theta)


@quantile.register(dist.Weibull)
def _(law: dist.Weibull, z: Array) -> Array:
    return law.scale * (-log_above(z)) ** (1 / law.concentration)


@log_tails.register(dist.Weibull)
def _(law: dist.Weibull, theta: Array) -> tuple[Array, Array]:
    return from_survival(-((theta / law.scale) ** law.concentration))


@quantile.register(dist.Gompertz)
def _(law: dist.Gompertz, z: Array) -> Array:
    return jnp.log1p(-log_above(z) / law.concentration) / law.rate


@log_tails.register(dist.Gompertz)
def _(law: dist.Gompertz, theta: Array) -> tuple[Array, Array]:
    return from_survival(-law.concentration * jnp.expm1(law.rate * theta))


@quantile.register(dist.Gumbel)
def _(law: dist.Gumbel, z: Array) -> Array:
    return law.loc - law.scale * jnp.log(-log_above(-z))


@log_tails.register(dist.Gumbel)
def _(law: dist.Gumbel, theta: Array) -> tuple[Array, Array]:
    above, below = from_survival(-jnp.exp((law.loc - theta) / law.scale))
    return below, above


# Absolute values of symmetric laws: S(theta) is twice the tail of the symmetric one.


@quantile.register(dist.HalfNormal)
def _(law: dist.HalfNormal, z: Array) -> Array:
    near = math.sqrt(2) * erfinv(ndtr(jnp.where(z < 0, z, 0.0)))
    far = -log_ndtri(log_ndtr(jnp.where(z < 0, 0.0, -z)) - LOG_2)
    return law.scale * jnp.where(z < 0, near, far)


@log_tails.register(dist.HalfNormal)
def _(law: dist.HalfNormal, theta: Array) -> tuple[Array, Array]:
    standard = theta / law.scale
    below = jnp.log(erf(standard / math.sqrt(2)))
    return below, LOG_2 + log_ndtr(-standard)


@quantile.register(dist.HalfCauchy)
def _(law: dist.HalfCauchy, z: Array) -> Array:
    near = jnp.tan(math.pi / 2 * ndtr(jnp.where(z < 0, z, 0.0)))
    far = _cotangent(log_ndtr(jnp.where(z < 0, 0.0, -z)) - LOG_2)
    return law.scale * jnp.where(z < 0, near, far)


@log_tails.register(dist.HalfCauchy)
def _(law: dist.HalfCauchy, theta: Array) -> tuple[Array, Array]:
    s = theta / law.scale
    return jnp.log(2 / math.pi * jnp.arctan(s)), LOG_2 + _cauchy_log_tail(s)


# Symmetric laws, by their lower half.


@quantile.register(dist.Cauchy)
def _(law: dist.Cauchy, z: Array) -> Array:
    return mirrored(law, z, lambda log_p: -_cotangent(log_p))


@log_tails.register(dist.Cauchy)
def _(law: dist.Cauchy, theta: Array) -> tuple[Array, Array]:
    return both_tails(law, theta, _cauchy_log_tail)


@quantile.register(dist.Laplace)
def _(law: dist.Laplace, z: Array) -> Array:
    return mirrored(law, z, lambda log_p: log_p + LOG_2)


@log_tails.register(dist.Laplace)
def _(law: dist.Laplace, theta: Array) -> tuple[Array, Array]:
    return both_tails(law, theta, lambda s: -s - LOG_2)


@quantile.register(dist.Logistic)
def _(law: dist.Logistic, z: Array) -> Array:
    return mirrored(law, z, lambda log_p: log_p - jnp.log1p(-jnp.exp(log_p)))


@log_tails.register(dist.Logistic)
def _(law: dist.Logistic, theta: Array) -> tuple[Array, Array]:
    return both_tails(law, theta, lambda s: jax.nn.log_sigmoid(-s))


@quantile.register(dist.SoftLaplace)
def _(law: dist.SoftLaplace, z: Array) -> Array:
    return mirrored(law, z, lambda log_p: jnp.log(jnp.tan(math.pi / 2 * jnp.exp(log_p))))


@log_tails.register(dist.SoftLaplace)
def _(law: dist.SoftLaplace, theta: Array) -> tuple[Array, Array]:
    return both_tails(law, theta, lambda s: jnp.log(2 / math.pi * jnp.arctan(jnp.exp(-s))))


# Truncated normal laws.


@quantile.register(Truncated)
def _(law: Any, z: Array) -> Array:
    if not isinstance(law.base_dist, dist.Normal):
        return quantile.dispatch(object)(law, z)
    low, high = _standard_ends(law)
    # Phi and 1 - Phi of theta lie between those of the ends, in the ratio of the masses.
    below = jnp.logaddexp(log_above(z) + log_ndtr(low), log_above(-z) + log_ndtr(high))
    above = jnp.logaddexp(log_above(z) + log_ndtr(-low), log_above(-z) + log_ndtr(-high))
    return law.base_dist.loc + law.base_dist.scale * smaller_tail(below, above)


@log_tails.register(Truncated)
def _(law: Any, theta: Array) -> tuple[Array, Array]:
    if not isinstance(law.base_dist, dist.Normal):
        return log_tails.dispatch(object)(law, theta)
    low, high = _standard_ends(law)
    standard = (theta - law.base_dist.loc) / law.base_dist.scale
    total = _log_mass(low, high)
    return _log_mass(low, standard) - total, _log_mass(standard, high) - total


def _standard_ends(law: Any) -> tuple[Array, Array]:
    loc, scale = law.base_dist.loc, law.base_dist.scale
    low, high = getattr(law, "low", -jnp.inf), getattr(law, "high", jnp.inf)
    return jnp.asarray((low - loc) / scale), jnp.asarray((high - loc) / scale)


def _log_mass(low: Array, high: Array) -> Array:
    return truncated_normal(low, high, jnp.zeros_like(low), 1.0).log_mass


# Laws whose quantiles are solved for, in a coordinate u on the real line.


@quantile.register(dist.Beta | dist.Gamma | dist.StudentT)
def _(law: Any, z: Array) -> Array:
    return _solve(law, z)


@normal_score.register(dist.Beta | dist.Gamma | dist.StudentT)
def _(law: Any, theta: Array) -> Array:
    return _score(law, theta)


@singledispatch
def _coordinate(law: Any, u: Array) -> Array:
    """The increasing map from the real line onto the support."""
    raise NotImplementedError(f"no coordinate for {law}")


@_coordinate.register(dist.Beta)
def _(law: dist.Beta, u: Array) -> Array:
    return jax.nn.sigmoid(u)


@log_tails.register(dist.Beta)
def _(law: dist.Beta, theta: Array) -> tuple[Array, Array]:
    a, b = _like(law.concentration1, theta), _like(law.concentration0, theta)
    return jnp.log(betainc(a, b, theta)), jnp.log(betainc(b, a, 1 - theta))


@_coordinate.register(dist.Gamma)
def _(law: dist.Gamma, u: Array) -> Array:
    return jnp.exp(u) / law.rate


@log_tails.register(dist.Gamma)
def _(law: dist.Gamma, theta: Array) -> tuple[Array, Array]:
    a, x = _like(law.concentration, theta), law.rate * theta
    return jnp.log(gammainc(a, x)), jnp.log(gammaincc(a, x))


@_coordinate.register(dist.StudentT)
def _(law: dist.StudentT, u: Array) -> Array:
    return law.loc + law.scale * jnp.sinh(u)


@log_tails.register(dist.StudentT)
def _(law: dist.StudentT, theta: Array) -> tuple[Array, Array]:
    return both_tails(law, theta, lambda s: _student_log_tail(_like(law.df, s), s))


@jax.custom_jvp
def _student_log_tail(df: Array, s: Array) -> Array:
    """`log P(t > s)` for `s >= 0`."""
    # Each form where it is precise: the tail near one half, small, and a power of s.
    root = s / jnp.sqrt(df)
    is_near, is_far = s**2 < jnp.minimum(df, 1), root > jnp.finfo(s.dtype).eps ** -0.5
    ratio = jnp.where(is_far, 1.0, root) ** 2
    half = jnp.full_like(s, 0.5)
    inner = betainc(half, df / 2, jnp.where(is_near, ratio / (1 + ratio), 0.5))
    outer = betainc(df / 2, half, jnp.where(is_near, 0.5, 1 / (1 + ratio)))
    log_root = jnp.log(jnp.where(is_far, s, 1.0)) - jnp.log(df) / 2
    power = -df * log_root - jnp.log(df / 2) - betaln(df / 2, half)
    tail = jnp.where(is_near, jnp.log1p(-inner), jnp.log(outer))
    return jnp.where(is_far, power, tail) - LOG_2


def _student_log_tail_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (df, s), (df_dot, s_dot) = primals, tangents
    if not _is_zero(df_dot):
        raise NotImplementedError("quantiles of StudentT are not differentiable in df")
    value = _student_log_tail(df, s)
    slope = -jnp.exp(dist.StudentT(df).log_prob(s) - value)
    return value, slope * _dense(s_dot, s)


_student_log_tail.defjvp(_student_log_tail_jvp, symbolic_zeros=True)


def _cotangent(log_p: Array) -> Array:
    """`cot(pi p)` for `0 < p <= 1/2`; its derivative does not overflow before itself."""
    x = math.pi * jnp.exp(log_p)
    is_small = x < 3e-4
    safe = jnp.where(is_small, 1.0, x)
    return jnp.exp(-log_p) / math.pi * jnp.where(is_small, 1 - x**2 / 3, safe / jnp.tan(safe))


def _cauchy_log_tail(s: Array) -> Array:
    near = 0.5 - jnp.arctan(jnp.where(s < 1, s, 0.0)) / math.pi
    return jnp.log(jnp.where(s < 1, near, jnp.arctan(1 / jnp.where(s < 1, 1.0, s)) / math.pi))


@jax.custom_jvp
def _solve(law: Any, z: Array) -> Array:
    """The `theta` whose normal score is `z`: Newton's method, kept in a bracket by bisection."""
    z = jnp.broadcast_to(z, jnp.broadcast_shapes(jnp.shape(z), law.batch_shape))
    limits = jnp.finfo(z.dtype)
    # At these, exp(u) is zero and infinite: theta is at the ends of the support.
    lowest = jnp.full_like(z, 1.2 * math.log(float(limits.tiny)))
    highest = jnp.full_like(z, 1.05 * math.log(float(limits.max)))

    def improve(state: Any) -> Any:
        u, low, high, last, is_done, count = state
        theta, stretch = jax.jvp(lambda u: _coordinate(law, u), (u,), (jnp.ones_like(u),))
        value = smaller_tail(*log_tails(law, theta))
        low, high = jnp.where(value < z, u, low), jnp.where(value < z, high, u)
        newton = u - (value - z) / (stretch * jnp.exp(law.log_prob(theta) - log_normal(value)))
        inside = (newton >= low) & (newton <= high)
        new = jnp.where(inside, newton, low + (high - low) / 2)
        new = jnp.where(is_done, u, new)
        # Newton's method squares the error of a small step, unless the rest is rounding.
        error = jnp.abs(value - z)
        step = jnp.abs(new - u) / (1 + jnp.abs(u))
        is_rounding = (error >= last) & (error < FAR) & (step <= limits.eps**0.5)
        is_level = error <= 8 * limits.eps * (1 + jnp.abs(z))
        is_done = is_done | is_level | is_rounding | (step <= 2 * limits.eps)
        return new, low, high, error, is_done, count + 1

    def unfinished(state: Any) -> Any:
        return ~jnp.all(state[4]) & (state[5] < MAX_STEPS)

    error, is_done = jnp.full_like(z, jnp.inf), jnp.zeros(z.shape, bool)
    start = jnp.zeros_like(z), lowest, highest, error, is_done, 0
    u, low, high, error, _, _ = jax.lax.while_loop(unfinished, improve, start)
    # Where no number has this score, theta is beyond the last one, at the end of the support.
    u = jnp.where(error > FAR, jnp.where(z < 0, low, high), u)
    return _coordinate(law, u)


def _solve_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """`dtheta = (N(z) dz - dF) / p(theta)`, with `dF` that of the law's parameters."""
    (law, z), (law_dot, z_dot) = primals, tangents
    theta = _solve(law, z)
    slope = jnp.exp(log_normal(z) - law.log_prob(theta))
    return theta, slope * (_dense(z_dot, z) - _score_of_law(law, theta, law_dot))


_solve.defjvp(_solve_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _score(law: Any, theta: Array) -> Array:
    """The normal score, whose derivative is a ratio of densities."""
    return smaller_tail(*log_tails(law, theta))


def _score_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (law, theta), (law_dot, theta_dot) = primals, tangents
    z = _score(law, theta)
    slope = jnp.exp(law.log_prob(theta) - log_normal(z))
    return z, slope * _dense(theta_dot, theta) + _score_of_law(law, theta, law_dot)


_score.defjvp(_score_jvp, symbolic_zeros=True)


def _score_of_law(law: Any, theta: Array, law_dot: Any) -> Array:
    """Derivative of the normal score in the parameters of the law."""
    if all(map(_is_zero, jax.tree.leaves(law_dot, is_leaf=_is_zero))):
        return jnp.zeros_like(theta)
    law_dot = jax.tree.map(_dense, law_dot, law, is_leaf=_is_zero)
    score = jax.jvp(lambda law: smaller_tail(*log_tails(law, theta)), (law,), (law_dot,))
    return score[1]


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _dense(tangent: Any, primal: Any) -> Array:
    return jnp.zeros_like(primal) if _is_zero(tangent) else tangent


def _like(parameter: Any, value: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(parameter, value.dtype), jnp.shape(value))


__all__ = ["log_tails", "normal_score", "quantile"]
