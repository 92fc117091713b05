"""Kernels that take values of the density and no gradient, for a few dimensions.

They serve likelihoods that JAX cannot differentiate, and check kernels that take gradients. Their
cost per independent draw grows at least in proportion to the number of coordinates.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.random_walk import normal
from blackjax.mcmc.slice import SliceState
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from scoreprior._run import Draws
from scoreprior._slice import slice_line
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count
from scoreprior.mcmc.adaptive import AbstractAdaptiveChains
from scoreprior.mcmc.chains import warn_nan


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


def _square_root(covariance: Array) -> Array:
    """Standard deviations [size], or the Cholesky factor [size, size]."""
    return jnp.sqrt(covariance) if covariance.ndim == 1 else jnp.linalg.cholesky(covariance)
