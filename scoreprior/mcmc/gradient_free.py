"""Kernels that take values of the density and no gradient, for a few dimensions.

They serve likelihoods that JAX cannot differentiate, and check kernels that take gradients. Their
cost per independent draw grows at least in proportion to the number of coordinates.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.random_walk import normal
from blackjax.mcmc.slice import SliceState
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Int

from scoreprior._run import Draws
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count
from scoreprior.mcmc.adaptive import AbstractAdaptiveChains
from scoreprior.mcmc.chains import warn_nan

MAX_SHRINKAGE = 100  # a bracket is then of no width in any precision


class RandomWalk(AbstractAdaptiveChains):
    """Random-walk Metropolis (Metropolis et al. 1953), by blackjax.

    Steps are `N(0, step_size^2 C)`, with the covariance `C` or variances of the posterior that the
    warm-up learns (Haario, Saksman & Tamminen 2001). One value of the density per draw. A proposal
    whose density is NaN is refused, its draw is `diverging`, and a warning counts them.

    **Arguments:** `target_accept`: mean acceptance rate, in (0, 1); 0.234 is best for many
    independent coordinates (Roberts, Gelman & Gilks 1997). The others are those of `NUTS`.
    """

    target_accept: float = eqx.field(static=True, default=0.234, kw_only=True)

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.additive_step_random_walk.init(position, logdensity_fn)

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        inverse_mass_matrix: Array,
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        steps = normal(step_size * _square_root(inverse_mass_matrix))
        kernel, values = blackjax.additive_step_random_walk.build_kernel(), []

        def watched(position: Any) -> Scalar:
            values.append(logdensity_fn(position))
            return values[-1]

        # blackjax refuses NaN as it does minus infinity, and does not say so.
        chain, info = kernel(key, chain, watched, steps)
        (proposed,) = values
        return chain, info.acceptance_rate, {"diverging": jnp.isnan(proposed)}

    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        return f"acceptance {outputs['stats']['acceptance_rate'].mean():.2f}"

    def warn(self, draws: Draws) -> None:
        warn_nan(draws)


class Slice(AbstractAdaptiveChains):
    """Slice sampling along a random line (Neal 2003, sections 4 and 5.1).

    The direction of the line is uniform in coordinates scaled by the standard deviations, or the
    covariance, that the warm-up learns: hit-and-run. The bracket is found by stepping out and
    shrunk. There is no step size to tune, and a draw takes some five values of the density. A point
    where the density is NaN lies outside every slice; a draw on the way to which there was one is
    `diverging`, and a warning counts them.

    **Arguments:** `step_size`: width of the first bracket in standard deviations. `max_expansions`:
    at most so many widths in a bracket. The others are those of `NUTS`.
    """

    target_accept: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    step_size: float = eqx.field(static=True, default=2.5, kw_only=True)
    max_expansions: int = eqx.field(static=True, default=10, kw_only=True)

    def __check_init__(self):
        check_count("max_expansions", self.max_expansions)

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.slice_sampling.init(position, logdensity_fn)

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        inverse_mass_matrix: Array,
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        key_line, key_slice = jax.random.split(key)
        flat, unravel = ravel_pytree(chain.position)
        noise = jax.random.normal(key_line, flat.shape, flat.dtype)
        unit, root = noise / jnp.linalg.norm(noise), _square_root(inverse_mass_matrix)
        direction = root * unit if root.ndim == 1 else root @ unit

        def at(t: Scalar) -> SliceState:
            moved = unravel(flat + t * direction)
            return SliceState(moved, logdensity_fn(moved))

        chain, found, stats = slice_line(key_slice, chain, at, step_size, self.max_expansions)
        return chain, jnp.asarray(found, step_size.dtype), stats

    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        return f"{outputs['stats']['n_steps'].mean():.1f} densities per draw"

    def warn(self, draws: Draws) -> None:
        warn_nan(draws)


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
    chain: SliceState  # the last point
    num_evaluations: Int[Array, ""]
    found: Bool[Array, ""]
    diverging: Bool[Array, ""]


def slice_line(
    key: Key,
    chain: SliceState,
    at: Callable[[Scalar], SliceState],
    width: Scalar,
    max_expansions: int,
) -> tuple[SliceState, Bool[Array, ""], dict[str, Array]]:
    """One step along the line `at(t)`, with `at(0)` = `chain` (Neal 2003, figures 3 and 5).

    Returns the next state, whether one was found, which rounding alone can prevent, and statistics.
    blackjax's kernel takes NaN to be outside too, and has no way to report it.
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


def _square_root(covariance: Array) -> Array:
    """Standard deviations [size], or the Cholesky factor [size, size]."""
    return jnp.sqrt(covariance) if covariance.ndim == 1 else jnp.linalg.cholesky(covariance)
