"""`NUTS`: the no-U-turn sampler on a `Problem`, all chains in one compiled program."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import blackjax
import equinox as eqx
from jaxtyping import Array

from scoreprior._run import Draws
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count
from scoreprior.mcmc.adaptive import AbstractAdaptiveChains


class NUTS(AbstractAdaptiveChains):
    """The no-U-turn sampler (Hoffman & Gelman 2014), by blackjax.

    Chains advance in lock step under `vmap`. In the warm-up each learns
    its step size, and all together learn one mass matrix.

    **Arguments:** `num_warmup`, `num_samples`: steps per chain; `num_chains`. `centred`: sample `x`
    with the prior's density policy, rather than its noise. `target_accept`: mean acceptance rate,
    between 0 and 1, which draws then have; Stan's warm-up, asked for its default of 0.8, gives some
    0.88. `max_tree_depth`: at most `2^depth - 1` gradients per draw. `dense_mass`: learn
    a full mass matrix. `step_size`: the first one; without a warm-up the only one, beside a unit
    mass matrix. `chunk_size`: steps between two updates of the progress bar and of the checkpoint;
    it does not change the draws. `init`: where chains start, at prior draws by default.
    """

    target_accept: float = eqx.field(static=True, default=0.9, kw_only=True)
    max_tree_depth: int = eqx.field(static=True, default=10, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=25, kw_only=True)

    def __check_init__(self):
        check_count("max_tree_depth", self.max_tree_depth)

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.nuts.init(position, logdensity_fn)

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        inverse_mass_matrix: Array,
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        chain, info = blackjax.nuts.build_kernel()(
            key,
            chain,
            logdensity_fn,
            step_size,
            inverse_mass_matrix,
            max_num_doublings=self.max_tree_depth,
        )
        depth = info.num_trajectory_expansions
        stats = {
            "diverging": info.is_divergent,
            "energy": info.energy,
            "n_steps": info.num_integration_steps,
            "reached_max_tree_depth": (depth >= self.max_tree_depth) & ~info.is_turning,
            "tree_depth": depth,
        }
        return chain, info.acceptance_rate, stats

    def warn(self, draws: Draws) -> None:
        super().warn(draws)
        reached = draws.stats["reached_max_tree_depth"]
        if saturated := int(reached.sum()):
            warnings.warn(
                f"{saturated} of {math.prod(reached.shape)} draws reached max_tree_depth = "
                f"{self.max_tree_depth}: draws are correlated; try dense_mass=True, a longer "
                "num_warmup, or a larger max_tree_depth",
                stacklevel=3,
            )
