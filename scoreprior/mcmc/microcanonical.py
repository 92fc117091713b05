"""`MCLMC` and `AdjustedMCLMC`: dynamics at constant energy, with a momentum of constant length."""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.mclmc_adaptation import MCLMCAdaptationState
from blackjax.mcmc.dynamic_hmc import halton_trajectory_length
from blackjax.util import generate_unit_vector, pytree_size
from jaxtyping import Array, Int

from scoreprior._run import Draws
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.mcmc.tuned import AbstractTunedChains
from scoreprior.problem import Problem

MIN_WARMUP = 50
MAX_EXCESS = 20.0  # of the energy variance over what was asked for
MIN_LENGTHS = 10  # in which momentum decoheres, per chain


class AbstractMicrocanonical(AbstractTunedChains):
    """What both share: every chain is tuned by itself, from where it starts."""

    step_size: eqx.AbstractVar[float | None]

    def __check_init__(self):
        if self.step_size is not None:
            check_positive("step_size", self.step_size)
        if 0 < self.num_warmup < MIN_WARMUP:
            raise ValueError(
                f"num_warmup must be 0 or at least {MIN_WARMUP}, got {self.num_warmup}"
            )

    @abstractmethod
    def tune_one(
        self, key: Key, chain: Any, logdensity_fn: Callable[..., Any], start: MCLMCAdaptationState
    ) -> tuple[Any, MCLMCAdaptationState]:
        """The warm-up of one chain, from the settings `start`."""

    @abstractmethod
    def guess(self, size: int) -> tuple[float, float]:
        """The first step size and trajectory length, for positions of `size` numbers."""

    def tune(self, problem: Problem, chains: Any, key: Key) -> tuple[Any, dict[str, Array]]:
        dtype = chains.logdensity.dtype
        size = pytree_size(chains.position) // self.num_chains
        step_size, length = (jnp.asarray(value, dtype) for value in self.guess(size))
        start = MCLMCAdaptationState(length, step_size, jnp.ones(size, dtype))

        def one(key: Key, chain: Any) -> Any:
            key_refresh, key_tune = jax.random.split(key)
            chain = self.refresh(key_refresh, chain)
            if not self.num_warmup:
                return chain, start
            return self.tune_one(key_tune, chain, problem.log_density, start)

        chains, found = jax.vmap(one)(jax.random.split(key, self.num_chains), chains)
        tuned = {
            "step_size": found.step_size,
            "trajectory_length": found.L,
            "inverse_mass_matrix": found.inverse_mass_matrix,
        }
        return chains, {name: value.astype(dtype) for name, value in tuned.items()}

    def refresh(self, key: Key, chain: Any) -> Any:
        """`chain` with all that is random in its state drawn anew."""
        return chain


class MCLMC(AbstractMicrocanonical):
    """Microcanonical Langevin Monte Carlo (Robnik, De Luca, Silverstein & Seljak 2023).

    **Approximate**: no step is ever rejected, so draws have a bias that vanishes only with the step
    size. The warm-up, by blackjax, sets the step size so that the energy changes in a step by
    a variance of `desired_energy_var` per dimension; the average is one of logarithms, so where
    most of the variance comes from few steps, all of them have several times as much. The law of
    the draws differs from the target by a factor whose log changes by the energy error in one step,
    and altogether in the `sqrt(size) / step_size` steps that it takes to cross the posterior. So
    its standard deviation is about `size * sqrt(desired_energy_var) / step_size`, in units where
    the posterior has width one, and to first order the bias of a mean, in standard deviations, is
    at most that. It falls as `desired_energy_var^(1/3)`. For exact draws take `AdjustedMCLMC`.

    Gradients must be those of the log density: with a `ScoreGradient` in the centred form, draws
    follow the score and not the density.

    **Arguments:** `num_warmup`: steps, 0 or at least 50; `num_samples`; `num_chains`. `centred`:
    sample `x` with the prior's density policy, rather than its noise. `desired_energy_var`:
    variance of the energy change in one step, per dimension. `diagonal_mass`: learn a diagonal mass
    matrix. `step_size`: the first one, `sqrt(size) / 4` when `None`; without a warm-up the only
    one, beside a unit mass matrix and a momentum that decoheres in a length of `sqrt(size)`.
    `thinning`: steps per draw, each of two gradients. `chunk_size`: draws between two updates of
    the progress bar and of the checkpoint; it does not change them.

    In the statistics `trajectory_length` is the length `L` in which momentum decoheres,
    `energy_change` the root mean square over the steps of a draw, and `diverging` says that a step
    led to NaN and was undone.
    """

    num_warmup: int = eqx.field(static=True, default=2000)
    num_samples: int = eqx.field(static=True, default=1000)
    num_chains: int = eqx.field(static=True, default=4)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    desired_energy_var: float = eqx.field(static=True, default=5e-4, kw_only=True)
    diagonal_mass: bool = eqx.field(static=True, default=True, kw_only=True)
    step_size: float | None = eqx.field(static=True, default=None, kw_only=True)
    thinning: int = eqx.field(static=True, default=2, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=100, kw_only=True)

    def __check_init__(self):
        check_positive("desired_energy_var", self.desired_energy_var)

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        _check_size(position)
        return blackjax.mclmc.init(position, logdensity_fn, jax.random.key(0))

    def refresh(self, key: Key, chain: Any) -> Any:
        return chain._replace(momentum=generate_unit_vector(key, chain.position))

    def guess(self, size: int) -> tuple[float, float]:
        return self.step_size or 0.25 * size**0.5, size**0.5

    def tune_one(
        self, key: Key, chain: Any, logdensity_fn: Callable[..., Any], start: MCLMCAdaptationState
    ) -> tuple[Any, MCLMCAdaptationState]:
        # blackjax adds a third to its second phase, in which the step size follows the mass matrix.
        part = 0.3 if self.diagonal_mass else 1 / 3
        chain, found, _ = blackjax.mclmc_find_L_and_step_size(
            blackjax.mclmc.build_kernel(),
            self.num_warmup,
            chain,
            key,
            logdensity_fn,
            frac_tune1=part,
            frac_tune2=part,
            frac_tune3=part,
            desired_energy_var=self.desired_energy_var,
            diagonal_preconditioning=self.diagonal_mass,
            params=start,
        )
        return chain, found

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        tuned: dict[str, Array],
    ) -> tuple[Any, dict[str, Array]]:
        chain, info = blackjax.mclmc.build_kernel()(
            key,
            chain,
            logdensity_fn,
            tuned["inverse_mass_matrix"],
            tuned["trajectory_length"],
            tuned["step_size"],
        )
        return chain, {
            "diverging": jnp.logical_not(info.nonans),
            "energy_change": info.energy_change,
            "n_steps": jnp.asarray(1),
        }

    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        change = np.sqrt(np.mean(outputs["stats"]["energy_change"] ** 2))
        return f"{super().describe(outputs)}, energy change {change:.2g}"

    def warn(self, draws: Draws) -> None:
        super().warn(draws)
        stats = draws.stats
        size = sum(leaf[0, 0].size for leaf in draws.positions.values())
        excess = float((stats["energy_change"] ** 2).mean() / (size * self.desired_energy_var))
        if excess > MAX_EXCESS:
            remedy = "raise num_warmup" if self.num_warmup else "take a smaller step_size"
            warnings.warn(
                f"the energy varies {excess:.2g} times as much as desired_energy_var = "
                f"{self.desired_energy_var} asks for, so draws are more biased than that: "
                f"{remedy}, or take AdjustedMCLMC",
                stacklevel=3,
            )
        path = stats["step_size"].mean(1) * stats["n_steps"].sum(1)
        lengths = path / stats["trajectory_length"].mean(1)
        if (lengths < MIN_LENGTHS).any():
            warnings.warn(
                f"a chain went only {lengths.min():.2g} times the length in which its momentum "
                f"decoheres: raise num_samples or thinning, and num_warmup above {self.num_warmup}",
                stacklevel=3,
            )

    def remedy(self) -> str:
        return f"lower desired_energy_var below {self.desired_energy_var}"


class AdjustedMCLMC(AbstractMicrocanonical):
    """Metropolis-adjusted microcanonical dynamics (Robnik, Cohn-Gordon & Seljak 2025), by blackjax.

    A trajectory of a few isokinetic steps from a new direction is accepted or rejected by its
    energy error, so draws are exact. The number of steps is quasi-random, the same for all chains.

    **Arguments:** `num_warmup`: trajectories, 0 or at least 50; `num_samples`; `num_chains`.
    `centred`: sample `x` with the prior's density policy, rather than its noise. `target_accept`:
    mean acceptance rate, between 0 and 1. `mean_steps`: steps per trajectory, at least 1.2 (with
    `1.1` and less blackjax's tuning fails). `max_steps` per trajectory, which bounds the warm-up
    where its step size collapses. `diagonal_mass`: learn a diagonal mass matrix. `step_size`: the
    first one, `sqrt(size) / 5` when `None`; without a warm-up the only one, beside a unit mass
    matrix. `thinning`: trajectories per draw. `chunk_size`: draws between two updates of the
    progress bar and of the checkpoint; it does not change them.

    In the statistics `n_steps` counts steps, each of two gradients.
    """

    num_warmup: int = eqx.field(static=True, default=500)
    num_samples: int = eqx.field(static=True, default=500)
    num_chains: int = eqx.field(static=True, default=4)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    target_accept: float = eqx.field(static=True, default=0.8, kw_only=True)
    mean_steps: float = eqx.field(static=True, default=4.0, kw_only=True)
    max_steps: int = eqx.field(static=True, default=100, kw_only=True)
    diagonal_mass: bool = eqx.field(static=True, default=True, kw_only=True)
    step_size: float | None = eqx.field(static=True, default=None, kw_only=True)
    thinning: int = eqx.field(static=True, default=1, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=25, kw_only=True)

    def __check_init__(self):
        check_positive("mean_steps", self.mean_steps)
        check_count("max_steps", self.max_steps)
        if self.mean_steps < 1.2:
            raise ValueError(f"mean_steps must be at least 1.2, got {self.mean_steps}")
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must be between 0 and 1, got {self.target_accept}")

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        _check_size(position)
        return blackjax.adjusted_mclmc_dynamic.init(position, logdensity_fn, jnp.asarray(0))

    def guess(self, size: int) -> tuple[float, float]:
        step_size = self.step_size or 0.2 * size**0.5
        return step_size, self.mean_steps * step_size

    def tune_one(
        self, key: Key, chain: Any, logdensity_fn: Callable[..., Any], start: MCLMCAdaptationState
    ) -> tuple[Any, MCLMCAdaptationState]:
        # blackjax makes its first phase twice, before and after the mass matrix is set.
        chain, found, _ = blackjax.adjusted_mclmc_find_L_and_step_size(
            _adjusted_kernel(self.max_steps),
            logdensity_fn,
            self.num_warmup,
            chain,
            key,
            self.target_accept,
            frac_tune1=0.35,
            frac_tune2=0.3,
            diagonal_preconditioning=self.diagonal_mass,
            params=start,
            target_num_integration_steps=self.mean_steps,
        )
        return chain, found

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        tuned: dict[str, Array],
    ) -> tuple[Any, dict[str, Array]]:
        chain, info = _adjusted_kernel(self.max_steps)(
            key,
            chain,
            logdensity_fn,
            tuned["step_size"],
            inverse_mass_matrix=tuned["inverse_mass_matrix"],
            integration_steps_params=(self.mean_steps,),
        )
        return chain, {
            "acceptance_rate": info.acceptance_rate,
            "diverging": info.is_divergent,
            "n_steps": info.num_integration_steps,
        }

    def remedy(self) -> str:
        return f"raise target_accept above {self.target_accept}"


def _adjusted_kernel(max_steps: int) -> Callable[..., Any]:
    """The kernel of blackjax, with a number of steps that a counter in the state determines."""

    def num_steps(number: Int[Array, ""], mean: Scalar | float) -> Int[Array, ""]:
        return halton_trajectory_length(number, mean).clip(1, max_steps)

    return blackjax.adjusted_mclmc_dynamic.build_kernel(
        integration_steps_fn=num_steps, next_random_arg_fn=lambda number: number + 1
    )


def _check_size(position: dict[str, Array]) -> None:
    if pytree_size(position) < 2:
        raise ValueError(
            "a momentum of constant length needs positions of at least 2 numbers, got "
            f"{pytree_size(position)}: take NUTS"
        )
