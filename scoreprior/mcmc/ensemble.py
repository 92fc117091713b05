"""`ChEES` and `MEADS`: Hamiltonian kernels tuned by an ensemble of many chains.

Both need no trees, so that chains on a wide machine do not wait for the deepest one.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackjax.mcmc.dynamic_hmc import halton_sequence
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from scoreprior._run import Draws
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.mcmc.tuned import AbstractTunedChains
from scoreprior.problem import Problem

MIN_ACCEPTANCE = 0.5
MIN_FOLD = 4


class ChEES(AbstractTunedChains):
    """Jittered Hamiltonian Monte Carlo, tuned by ChEES (Hoffman, Radul & Sountsov 2021).

    The warm-up learns one step size, from the acceptance rate, and one trajectory length for all
    chains: the one that most changes the squared distance from the mean, by stochastic gradient
    ascent over the ensemble, all by blackjax. The length of each trajectory is a quasi-random part
    of it, the same for all chains, so none waits for another. Draws are exact.

    **Arguments:** `num_warmup`, at least 1, and `num_samples`: trajectories per chain;
    `num_chains`, at least 2, better dozens. `centred`: sample `x` with the prior's density policy,
    rather than its noise. `target_accept`: harmonic mean of acceptance rates, between 0 and 1; the
    default is optimal for large dimensions (Beskos et al. 2013). `max_leapfrog_steps`: gradients
    per trajectory at most, in the warm-up. `diagonal_mass`: learn a diagonal mass matrix in the
    second half of the warm-up; it takes memory for the covariance of all coordinates. `step_size`:
    the first one.
    `learning_rate`: of Adam, on the log of the trajectory length. `thinning`: trajectories per
    draw. `chunk_size`: draws between two updates of the progress bar and of the checkpoint; it does
    not change them.
    """

    num_warmup: int = eqx.field(static=True, default=500)
    num_samples: int = eqx.field(static=True, default=500)
    num_chains: int = eqx.field(static=True, default=32)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    target_accept: float = eqx.field(static=True, default=0.651, kw_only=True)
    max_leapfrog_steps: int = eqx.field(static=True, default=1000, kw_only=True)
    diagonal_mass: bool = eqx.field(static=True, default=True, kw_only=True)
    step_size: float = eqx.field(static=True, default=0.5, kw_only=True)
    learning_rate: float = eqx.field(static=True, default=0.025, kw_only=True)
    thinning: int = eqx.field(static=True, default=1, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=25, kw_only=True)

    def __check_init__(self):
        check_count("num_warmup", self.num_warmup)
        check_count("num_chains", self.num_chains, least=2)
        check_count("max_leapfrog_steps", self.max_leapfrog_steps)
        check_positive("step_size", self.step_size)
        check_positive("learning_rate", self.learning_rate)
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must be between 0 and 1, got {self.target_accept}")

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.dynamic_hmc.init(position, logdensity_fn, jnp.asarray(0))

    def tune(self, problem: Problem, chains: Any, key: Key) -> tuple[Any, dict[str, Array]]:
        adaptation = blackjax.chees_adaptation(
            problem.log_density,
            self.num_chains,
            target_acceptance_rate=self.target_accept,
            max_leapfrog_steps=self.max_leapfrog_steps,
            mass_matrix_estimation="diagonal" if self.diagonal_mass else None,
            adaptation_info_fn=lambda *_: None,
        )
        (chains, found), _ = adaptation.run(
            key,
            chains.position,
            jnp.asarray(self.step_size, chains.logdensity.dtype),
            optax.adam(self.learning_rate),
            self.num_warmup,
            max_sampling_steps=self.num_samples * self.thinning,
        )
        step_size, (num_steps,) = found["step_size"], found["integration_steps_params"]
        tuned = {
            "step_size": step_size,
            "trajectory_length": num_steps * step_size,
            "inverse_mass_matrix": found["inverse_mass_matrix"],
        }
        return chains, _for_each(tuned, chains.logdensity)

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        tuned: dict[str, Array],
    ) -> tuple[Any, dict[str, Array]]:
        before = chain.logdensity
        chain, info = blackjax.dynamic_hmc.build_kernel(
            next_random_arg_fn=lambda number: number + 1,
            integration_steps_fn=self._num_steps,
        )(
            key,
            chain,
            logdensity_fn,
            tuned["step_size"],
            tuned["inverse_mass_matrix"],
            (tuned["trajectory_length"] / tuned["step_size"],),
        )
        kinetic = ravel_pytree(info.momentum)[0] ** 2 @ tuned["inverse_mass_matrix"] / 2
        return chain, {
            "acceptance_rate": info.acceptance_rate,
            "diverging": info.is_divergent,
            "energy": kinetic - before,
            "n_steps": info.num_integration_steps,
        }

    def _num_steps(self, number: Int[Array, ""], most: Scalar) -> Int[Array, ""]:
        """Leapfrog steps of trajectory `number`: between 1 and `most`, evenly over a run."""
        num_trajectories = self.num_warmup + self.num_samples * self.thinning
        part = halton_sequence(number, math.ceil(math.log2(num_trajectories)))
        return jnp.ceil(part * most).clip(1).astype(int)

    def remedy(self) -> str:
        return f"raise target_accept above {self.target_accept}"


class MEADS(AbstractTunedChains):
    """Generalised Hamiltonian Monte Carlo tuned by MEADS (Hoffman & Sountsov 2022), by blackjax.

    One leapfrog step per step, with a momentum that persists in part and a rejection rule that is
    not reversible, so that momentum is seldom lost. The warm-up (their algorithm 3) has no target:
    step size, mass matrix and damping come from the moments of the ensemble and of its gradients,
    each fold of chains using those of another. Draws are exact.

    **Arguments:** `num_warmup`, at least 1, and `num_samples`: steps per chain; `num_chains`, a
    multiple of `num_folds` and at least 4 times as many, better 16 times. `centred`: sample `x`
    with the prior's density policy, rather than its noise. `num_folds`: parts of the ensemble.
    `step_size_multiplier`: step size in units of the largest stable one. `damping_slowdown`: larger
    values damp more in early steps. `thinning`: steps, that is gradients, per draw. `chunk_size`:
    draws between two updates of the progress bar and of the checkpoint; it does not change them.
    """

    num_warmup: int = eqx.field(static=True, default=1000)
    num_samples: int = eqx.field(static=True, default=500)
    num_chains: int = eqx.field(static=True, default=64)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    num_folds: int = eqx.field(static=True, default=4, kw_only=True)
    step_size_multiplier: float = eqx.field(static=True, default=0.5, kw_only=True)
    damping_slowdown: float = eqx.field(static=True, default=1.0, kw_only=True)
    thinning: int = eqx.field(static=True, default=4, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=25, kw_only=True)

    def __check_init__(self):
        check_count("num_warmup", self.num_warmup)
        check_count("num_folds", self.num_folds)
        check_positive("step_size_multiplier", self.step_size_multiplier)
        check_positive("damping_slowdown", self.damping_slowdown)
        if self.num_chains % self.num_folds or self.num_chains < MIN_FOLD * self.num_folds:
            raise ValueError(
                f"num_chains must be a multiple of num_folds = {self.num_folds}, with at least "
                f"{MIN_FOLD} chains in each fold, got {self.num_chains}"
            )

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        # The warm-up draws momenta for itself.
        return blackjax.ghmc.init(position, logdensity_fn, jax.random.key(0))

    def tune(self, problem: Problem, chains: Any, key: Key) -> tuple[Any, dict[str, Array]]:
        adaptation = blackjax.meads_adaptation(
            problem.log_density,
            self.num_chains,
            self.num_folds,
            self.step_size_multiplier,
            self.damping_slowdown,
            adaptation_info_fn=lambda *_: None,
        )
        key_run, key_revive = jax.random.split(key)
        (chains, found), _ = adaptation.run(key_run, chains.position, self.num_warmup)
        tuned = {
            "step_size": found["step_size"],
            "scale": ravel_pytree(found["momentum_inverse_scale"])[0],
            "alpha": found["alpha"],
            "delta": found["delta"],
        }
        chains = _revive(key_revive, chains)
        return chains, _for_each(tuned, chains.logdensity)

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        tuned: dict[str, Array],
    ) -> tuple[Any, dict[str, Array]]:
        new, info = blackjax.ghmc.build_kernel()(
            key,
            chain,
            logdensity_fn,
            tuned["step_size"],
            tuned["scale"],
            tuned["alpha"],
            tuned["delta"],
        )
        # Of a rejected step with a huge error blackjax makes 0 * inf: the slice only moved on.
        moved = (chain.slice + 1 + tuned["delta"]) % 2 - 1
        new = new._replace(slice=jnp.where(jnp.isnan(new.slice), moved, new.slice))
        return new, {
            "acceptance_rate": info.acceptance_rate,
            "diverging": info.is_divergent,
            "n_steps": jnp.asarray(info.num_integration_steps),
        }

    def warn(self, draws: Draws) -> None:
        super().warn(draws)
        acceptance = float(np.mean(draws.stats["acceptance_rate"]))
        if acceptance < MIN_ACCEPTANCE:
            warnings.warn(
                f"only {acceptance:.2f} of the steps were accepted, and each rejection reverses "
                f"the momentum, so chains mix slowly: {self.remedy()}, or raise num_warmup",
                stacklevel=3,
            )

    def remedy(self) -> str:
        return f"lower step_size_multiplier below {self.step_size_multiplier}"


def _revive(key: Key, chains: Any) -> Any:
    """Chains that blackjax's warm-up stopped for good (slice NaN) go on from a random other one."""
    dead = jnp.isnan(chains.slice)
    key_source, key_slice = jax.random.split(key)
    alive = jnp.where(dead.all(), 1.0, ~dead)
    other = jax.random.choice(key_source, len(dead), dead.shape, p=alive / alive.sum())
    source = jnp.where(dead, other, jnp.arange(len(dead)))
    new = jax.tree.map(lambda leaf: leaf[source], chains)
    slices = jax.random.uniform(key_slice, dead.shape, chains.slice.dtype, -1, 1)
    return new._replace(slice=jnp.where(dead, slices, chains.slice))


def _for_each(tuned: dict[str, Array], like: Array) -> dict[str, Array]:
    """What all chains share, once for each of them, in the type of `like` [chain]."""

    def repeat(value: Array) -> Array:
        return jnp.broadcast_to(value.astype(like.dtype), (len(like), *value.shape))

    return {name: repeat(value) for name, value in tuned.items()}
