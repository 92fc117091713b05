"""Kernels that take gradients, beside NUTS: a fixed number of them per draw.

Every chain does the same work per draw, so chains in lock step never wait for one another.
Settings that are not named are those of `AbstractAdaptiveChains`.
"""

from collections.abc import Callable
from typing import Any

import blackjax
import equinox as eqx
import jax.numpy as jnp
from blackjax.mcmc.dynamic_hmc import DynamicHMCState, halton_trajectory_length
from blackjax.mcmc.metrics import default_metric
from jaxtyping import Array, Bool

from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count
from scoreprior.mcmc.adaptive import AbstractAdaptiveChains


class HMC(AbstractAdaptiveChains):
    """Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011, algorithm of figure 2), by blackjax.

    Trajectories all have the same length. One of about a quarter of the period of the posterior,
    which is `pi / 2` where the mass matrix is right, forgets its start; half a period ends at its
    mirror image, and a whole one at the start. If draws or their squares are correlated with either
    sign, use `DynamicHMC`.

    **Arguments:** `num_leapfrog`: gradients per draw. `target_accept`: mean acceptance rate, in
    (0, 1); 0.651 is best for many independent coordinates (Beskos et al. 2013), and more is safer.
    The others are those of `NUTS`.
    """

    num_leapfrog: int = eqx.field(static=True, default=10, kw_only=True)
    target_accept: float = eqx.field(static=True, default=0.8, kw_only=True)

    def __check_init__(self):
        check_count("num_leapfrog", self.num_leapfrog)

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.hmc.init(position, logdensity_fn)

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        inverse_mass_matrix: Array,
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        new, info = blackjax.hmc.build_kernel()(
            key, chain, logdensity_fn, step_size, inverse_mass_matrix, self.num_leapfrog
        )
        return new, info.acceptance_rate, _hamiltonian(chain, info, inverse_mass_matrix)


class DynamicHMC(AbstractAdaptiveChains):
    """Hamiltonian Monte Carlo with trajectories of changing length, by blackjax.

    The number of leapfrog steps runs through a Halton sequence, near uniform on
    `1 .. 2 num_leapfrog - 1` (Hoffman, Radul & Sountsov 2021, section 3.2), so that no period of
    the posterior can trap a chain. It is the same in all chains, which thus end together.

    **Arguments:** `num_leapfrog`: mean number of gradients per draw; with 1, every trajectory has
    one step. `target_accept`: mean acceptance rate, in (0, 1). The others are those of `NUTS`.
    """

    num_leapfrog: int = eqx.field(static=True, default=10, kw_only=True)
    target_accept: float = eqx.field(static=True, default=0.8, kw_only=True)

    def __check_init__(self):
        check_count("num_leapfrog", self.num_leapfrog)

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.dynamic_hmc.init(position, logdensity_fn, jnp.zeros((), jnp.int32))

    def kernel(
        self,
        key: Key,
        chain: DynamicHMCState,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        inverse_mass_matrix: Array,
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        kernel = blackjax.dynamic_hmc.build_kernel(
            next_random_arg_fn=lambda i: i + 1, integration_steps_fn=halton_trajectory_length
        )
        mean = (self.num_leapfrog,)
        new, info = kernel(key, chain, logdensity_fn, step_size, inverse_mass_matrix, mean)
        return new, info.acceptance_rate, _hamiltonian(chain, info, inverse_mass_matrix)


class MALA(AbstractAdaptiveChains):
    """The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996), preconditioned.

    It is Hamiltonian Monte Carlo with one leapfrog step (Neal 2011, section 5.2), and that is the
    kernel used: blackjax's own `mala` has no mass matrix.

    **Arguments:** `target_accept`: mean acceptance rate, in (0, 1); 0.574 is best for many
    independent coordinates (Roberts & Rosenthal 1998). The others are those of `NUTS`.
    """

    target_accept: float = eqx.field(static=True, default=0.574, kw_only=True)

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.hmc.init(position, logdensity_fn)

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        inverse_mass_matrix: Array,
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        new, info = blackjax.hmc.build_kernel()(
            key, chain, logdensity_fn, step_size, inverse_mass_matrix, 1
        )
        return new, info.acceptance_rate, _hamiltonian(chain, info, inverse_mass_matrix)


class Barker(AbstractAdaptiveChains):
    """Barker's proposal (Livingstone & Zanella 2022, algorithm 1 and appendix G), by blackjax.

    It uses the gradient only to choose the sign of every component of a step, so a steep gradient
    or a step size that is too large cannot throw a chain far off: robust where `MALA` is not, and
    slower where `MALA` works. One gradient per draw.

    **Arguments:** `target_accept`: mean acceptance rate, in (0, 1); 0.4 is that of the paper, and
    0.574 is best for many independent coordinates (Vogrinc, Livingstone & Zanella 2023). The others
    are those of `NUTS`.
    """

    target_accept: float = eqx.field(static=True, default=0.4, kw_only=True)

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.barker.init(position, logdensity_fn)

    def kernel(
        self,
        key: Key,
        chain: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        inverse_mass_matrix: Array,
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        # blackjax 1.7 makes steps of covariance M where Hamiltonian kernels have M^-1: its
        # "inverse mass matrix" is thus the inverse of the covariance that was learned.
        dense = inverse_mass_matrix.ndim == 2
        precision = jnp.linalg.inv(inverse_mass_matrix) if dense else 1 / inverse_mass_matrix
        new, info = blackjax.barker.build_kernel()(key, chain, logdensity_fn, step_size, precision)
        acceptance, diverging = refused_nan(info.acceptance_rate)
        return new, acceptance, {"diverging": diverging}


def refused_nan(acceptance: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
    """The acceptance rate, 0 where it is NaN, and whether it is.

    A proposal whose density is NaN is refused by every kernel, and counted as a divergence.
    """
    diverging = jnp.isnan(acceptance)
    return jnp.where(diverging, 0, acceptance), diverging


def _hamiltonian(chain: Any, info: Any, inverse_mass_matrix: Array) -> dict[str, Array]:
    """Statistics of a Hamiltonian step from `chain`; blackjax's energy is that of the proposal."""
    kinetic = default_metric(inverse_mass_matrix).kinetic_energy(info.momentum)
    return {
        "diverging": info.is_divergent,
        "energy": jnp.where(info.is_accepted, info.energy, kinetic - chain.logdensity),
        "n_steps": jnp.asarray(info.num_integration_steps),
    }
