"""Chains whose kernel is tuned in one piece, by one of blackjax's adaptations, before the loop."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scoreprior._run import Draws
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, is_traced
from scoreprior.mcmc.chains import AbstractChains
from scoreprior.problem import Problem

# What a draw says of the steps since the draw before; of everything else, the last step counts.
OVER_STEPS: dict[str, Callable[[Array], Array]] = {
    "acceptance_rate": jnp.mean,
    "diverging": jnp.any,
    "energy_change": lambda changes: jnp.sqrt(jnp.mean(changes**2)),
    "n_steps": jnp.sum,
}


class TunedState(NamedTuple):
    """blackjax's state of every chain, and what the warm-up found for its kernel, by name."""

    chains: Any  # leaves [chain, ...]
    tuned: dict[str, Array]  # [chain, ...]


class AbstractTunedChains(AbstractChains):
    """Chains with a warm-up that is one program; only draws are made in chunks."""

    thinning: eqx.AbstractVar[int]

    def __check_init__(self):
        check_count("thinning", self.thinning)

    @property
    def num_looped_warmup(self) -> int:
        return 0

    @abstractmethod
    def tune(self, problem: Problem, chains: Any, key: Key) -> tuple[Any, dict[str, Array]]:
        """The warm-up: states [chain, ...], and settings of the kernel [chain, ...] by name."""

    @abstractmethod
    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        tuned: dict[str, Array],
    ) -> tuple[Any, dict[str, Array]]:
        """One step of one chain: the next state, and statistics by name."""

    def first(self, problem: Problem, chains: Any, key: Key) -> TunedState:
        """The state after the warm-up. Raises `ValueError` where it found no usable settings."""
        state = _tune(self, problem, chains, key)
        for name, value in state.tuned.items():
            if is_traced(value):
                continue
            usable = (jnp.isfinite(value) & (value > 0)).reshape(self.num_chains, -1).all(1)
            if bad := int((~usable).sum()):
                raise ValueError(
                    f"the warm-up failed: {name} is not positive and finite for {bad} of "
                    f"{self.num_chains} chains; raise num_warmup above {self.num_warmup}, and look "
                    "for places where the log density is not finite"
                )
        return state

    def step(
        self, problem: Problem, state: TunedState, key: Key, number: Int[Array, ""]
    ) -> tuple[TunedState, dict[str, Any]]:
        def one(key: Key, chain: Any, tuned: dict[str, Array]) -> Any:
            def body(chain: Any, key: Key) -> Any:
                return self.kernel(key, chain, problem.log_density, tuned)

            chain, stats = jax.lax.scan(body, chain, jax.random.split(key, self.thinning))
            last = {name: values[-1] for name, values in stats.items()}
            return chain, last | {
                name: over(stats[name]) for name, over in OVER_STEPS.items() if name in stats
            }

        keys = jax.random.split(key, self.num_chains)
        chains, stats = jax.vmap(one)(keys, state.chains, state.tuned)
        settings = ("step_size", "trajectory_length")
        stats = {
            "lp": chains.logdensity,
            **{name: state.tuned[name] for name in settings if name in state.tuned},
            **stats,
        }
        return TunedState(chains, state.tuned), {"positions": chains.position, "stats": stats}

    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        stats = outputs["stats"]
        said = f"step {np.median(stats['step_size'][-1]):.2g}"
        if "acceptance_rate" in stats:
            said += f", acceptance {stats['acceptance_rate'].mean():.2f}"
        return f"{said}, {int(stats['diverging'].sum())} divergences"

    def warn(self, draws: Draws) -> None:
        diverging = draws.stats["diverging"]
        if stuck := int(diverging.all(1).sum()):
            warnings.warn(
                f"every draw of {stuck} of {len(diverging)} chains diverged, so these chains never "
                f"moved: {self.remedy()}, or take a longer num_warmup",
                stacklevel=3,
            )
        elif count := int(diverging.sum()):
            remedy = "use the non-centred form (centred=False), or " if self.centred else ""
            warnings.warn(
                f"{count} of {math.prod(diverging.shape)} draws diverged, so they may be biased: "
                f"{remedy}{self.remedy()}",
                stacklevel=3,
            )

    @abstractmethod
    def remedy(self) -> str:
        """Which setting makes steps smaller, in words that follow `biased:`."""


@eqx.filter_jit
def _tune(engine: AbstractTunedChains, problem: Problem, chains: Any, key: Key) -> TunedState:
    return TunedState(*engine.tune(problem, chains, key))
