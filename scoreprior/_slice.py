"""Slice sampling along a line, which says what it met: many kernels differ only in the line."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from scoreprior._typing import Key, Scalar

MAX_SHRINKAGE = 100  # a bracket is then of no width in any precision


class End(NamedTuple):
    """One end of a bracket that steps out."""

    t: Scalar
    num_left: Int[Array, ""]  # steps that it may still take
    inside: Bool[Array, ""]
    diverging: Bool[Array, ""]  # a density was NaN


class Shrinking(NamedTuple):
    """A bracket that shrinks towards `t = 0`, and what was found so far."""

    lower: Scalar
    upper: Scalar
    chain: Any  # the last point
    num_evaluations: Int[Array, ""]
    found: Bool[Array, ""]
    diverging: Bool[Array, ""]


def slice_line(
    key: Key,
    chain: Any,
    at: Callable[[Scalar], Any],
    width: Scalar,
    max_expansions: int,
) -> tuple[Any, Bool[Array, ""], dict[str, Array]]:
    """One step along the line `at(t)`, with `at(0)` = `chain` (Neal 2003, figures 3 and 5).

    States are named tuples with the field `logdensity`. Returns the next state, whether one was
    found, which rounding alone can prevent, and statistics. blackjax's kernel takes NaN to be
    outside too, and has no way to report it.
    """
    key_level, key_place, key_share, key_shrink = jax.random.split(key, 4)
    dtype = chain.logdensity.dtype
    # Of 1 - u, so that the level is finite.
    level = chain.logdensity + jnp.log1p(-jax.random.uniform(key_level, dtype=dtype))

    def step_out(t: Scalar, step: Scalar, num_steps: Int[Array, ""]) -> End:
        def look(t: Scalar, num_left: Int[Array, ""], diverging: Any) -> End:
            value = at(t).logdensity
            return End(t, num_left, value >= level, diverging | jnp.isnan(value))

        return jax.lax.while_loop(
            lambda end: end.inside & (end.num_left > 0),
            lambda end: look(end.t + step, end.num_left - 1, end.diverging),
            look(t, num_steps, jnp.zeros((), bool)),
        )

    lower = -width * jax.random.uniform(key_place, dtype=dtype)
    num_lower = jax.random.randint(key_share, (), 0, max_expansions)
    num_upper = max_expansions - 1 - num_lower
    left, right = step_out(lower, -width, num_lower), step_out(lower + width, width, num_upper)

    def shrink(bracket: Shrinking) -> Shrinking:
        own = jax.random.fold_in(key_shrink, bracket.num_evaluations)
        t = jax.random.uniform(own, (), dtype, bracket.lower, bracket.upper)
        point = at(t)
        return Shrinking(
            jnp.where(t < 0, t, bracket.lower),
            jnp.where(t < 0, bracket.upper, t),
            point,
            bracket.num_evaluations + 1,
            point.logdensity >= level,
            bracket.diverging | jnp.isnan(point.logdensity),
        )

    nothing, diverging = jnp.zeros((), bool), left.diverging | right.diverging
    first = Shrinking(left.t, right.t, chain, jnp.zeros((), jnp.int32), nothing, diverging)
    last = jax.lax.while_loop(
        lambda bracket: ~bracket.found & (bracket.num_evaluations < MAX_SHRINKAGE), shrink, first
    )
    new = jax.tree.map(lambda new, old: jnp.where(last.found, new, old), last.chain, chain)
    # Both ends of the bracket are looked at once more than it is expanded.
    num_expansions = max_expansions - 1 - left.num_left - right.num_left
    num_evaluations = num_expansions + 2 + last.num_evaluations
    return new, last.found, {"n_steps": num_evaluations, "diverging": last.diverging}
