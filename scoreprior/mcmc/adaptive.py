"""Chains whose kernel has a step size and a mass matrix, both learned in a warm-up."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from scoreprior._run import Draws
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_positive
from scoreprior.mcmc.chains import AbstractChains
from scoreprior.mcmc.warmup import Warmup, WarmupState
from scoreprior.problem import Problem


class ChainState(NamedTuple):
    """What the next step needs: blackjax's state of every chain and the shared adaptation."""

    chains: Any  # leaves [chain, ...]
    warmup: WarmupState


class AbstractAdaptiveChains(AbstractChains):
    """Chains under `Warmup`: a step size for each, one mass matrix for all.

    **Arguments:** `num_warmup`, `num_samples`: steps per chain; `num_chains`. `centred`: sample `x`
    with the prior's density policy, rather than its noise. `dense_mass`: learn a full covariance.
    `step_size`: the first one; without a warm-up the only one, beside unit scales. `chunk_size`:
    steps between two updates of the progress bar and of the checkpoint; it does not change the
    draws. `init`: where chains start, at prior draws by default. A subclass states its
    `target_accept`; where that is `None`, the step size is left as it is.
    """

    target_accept: eqx.AbstractVar[Any]  # a float, or None
    num_warmup: int = eqx.field(static=True, default=500)
    num_samples: int = eqx.field(static=True, default=500)
    num_chains: int = eqx.field(static=True, default=4)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    dense_mass: bool = eqx.field(static=True, default=False, kw_only=True)
    step_size: float = eqx.field(static=True, default=1.0, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=100, kw_only=True)

    def __check_init__(self):
        check_positive("step_size", self.step_size)
        if self.target_accept is not None and not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must be between 0 and 1, got {self.target_accept}")

    @abstractmethod
    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        inverse_mass_matrix: Array,
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        """One step of one chain: the next state, its acceptance rate, and statistics by name."""

    def first(self, problem: Problem, chains: Any, key: Key) -> ChainState:
        """Chains at their starting points, with `step_size` and the unit mass matrix."""
        size = sum(leaf[0].size for leaf in jax.tree.leaves(chains.position))
        step_sizes = jnp.full_like(chains.logdensity, self.step_size)
        return ChainState(chains, self._warmup().init(size, step_sizes))

    def step(
        self, problem: Problem, state: ChainState, key: Key, number: Int[Array, ""]
    ) -> tuple[ChainState, dict[str, Any]]:
        step_size, inverse_mass_matrix = state.warmup.step_size, state.warmup.inverse_mass_matrix

        def one(key: Key, chain: Any, step_size: Scalar) -> Any:
            return self.kernel(key, chain, problem.log_density, step_size, inverse_mass_matrix)

        keys = jax.random.split(key, self.num_chains)
        chains, acceptance, stats = jax.vmap(one)(keys, state.chains, step_size)
        flat = jax.vmap(lambda position: ravel_pytree(position)[0])(chains.position)
        with jax.ensure_compile_time_eval():
            schedule = jnp.asarray(self._warmup().schedule(self.num_samples))
        warmup = self._warmup().update(state.warmup, schedule[number], flat, acceptance)
        stats = {
            "acceptance_rate": acceptance,
            "lp": chains.logdensity,
            "step_size": step_size,
            **stats,
        }
        return ChainState(chains, warmup), {"positions": chains.position, "stats": stats}

    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        stats = outputs["stats"]
        said = f"step {np.median(stats['step_size'][-1]):.2g}"
        if "n_steps" in stats:
            said += f", {stats['n_steps'].mean():.0f} gradients per draw"
        if "diverging" in stats:
            return f"{said}, {int(stats['diverging'].sum())} divergences"
        return f"{said}, acceptance {stats['acceptance_rate'].mean():.2f}"

    def warn(self, draws: Draws) -> None:
        diverging = draws.stats.get("diverging", np.zeros(1))
        if count := int(diverging.sum()):
            remedy = (
                "use the non-centred form (centred=False), or raise"
                if self.centred
                else "look for a badly scaled or funnel-shaped nuisance parameter, or raise"
            )
            warnings.warn(
                f"{count} of {math.prod(diverging.shape)} draws diverged, so they may be biased: "
                f"{remedy} target_accept above {self.target_accept}",
                stacklevel=3,
            )

    def _warmup(self) -> Warmup:
        return Warmup(self.num_warmup, self.target_accept, self.dense_mass)
