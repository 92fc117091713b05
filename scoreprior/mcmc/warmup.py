"""Warm-up of Hamiltonian kernels: a step size per chain, one mass matrix for all chains.

Stan's schedule (fast, then slow windows that double, then fast; Stan reference manual, "HMC
algorithm parameters") with blackjax's dual averaging and Welford estimator. All chains feed one
covariance, so the windows of M chains are M times as informative. Step sizes stay apart: where one
chain is caught in a steep place, a shared step size would collapse for all of them.

Dual averaging (Hoffman & Gelman 2014, equation 6) departs from Stan's in two settings. The rate of
one step is a noisy answer, and at Stan's `gamma = 0.05` it throws `log step_size` about with a
standard deviation of 0.7 at the end of a window of 50. Dual averaging makes the mean of the
*rate* over those step sizes right, not the rate at their mean, which is what is used thereafter: it
is off by half that variance times the curvature of the rate. In 10 normal coordinates, where 0.234
was asked of `RandomWalk` and 0.574 of `MALA`, that gave 0.13 and 0.69. And it shrinks towards the
step size at which it starts, not towards ten times that, which a short window does not forget: a
new mass matrix changes the unit of the step size, and the step size is converted.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
from blackjax.adaptation.staged_adaptation import build_schedule
from blackjax.adaptation.step_size import dual_averaging_adaptation
from jaxtyping import Array, Float, Int

from scoreprior._typing import PyTree, Scalar

FAST, SLOW, FROZEN = 0, 1, 2
GAMMA = 0.2


class WarmupState(NamedTuple):
    """State of dual averaging and of the running covariance, and what the kernel uses now."""

    averaging: Any  # leaves [chain]
    covariance: Any
    step_size: Float[Array, " chains"]
    inverse_mass_matrix: Array  # [size] or [size, size]


class Warmup(eqx.Module):
    """Adaptation towards a mean acceptance rate of `target_accept` in every chain.

    Without one, `None`, step sizes stay as they are and the mass matrix alone is learned. Where
    `dense_mass` is `None` the kernel has no mass matrix, and one window is the whole warm-up.
    """

    num_steps: int = eqx.field(static=True)
    target_accept: float | None = eqx.field(static=True)
    dense_mass: bool | None = eqx.field(static=True)

    def schedule(self, num_draws: int) -> Int[np.ndarray, "steps 2"]:
        """For every step, draws included, its stage and what it ends.

        0 ends nothing, 1 a slow window, 2 the warm-up.
        """
        schedule = np.zeros((self.num_steps + num_draws, 2), int)
        schedule[self.num_steps :, 0] = FROZEN
        if self.num_steps:
            if self.dense_mass is not None:
                schedule[: self.num_steps] = np.asarray(build_schedule(self.num_steps))
            schedule[self.num_steps - 1, 1] = 2
        return schedule

    def init(self, size: int, step_size: Float[Array, " chains"]) -> WarmupState:
        """Start from the unit mass matrix, for positions of `size` numbers."""
        averaging = jax.vmap(self._averaging()[0])(step_size)
        covariance = self._covariance()[0](size)
        dtype = step_size.dtype
        state = WarmupState(averaging, covariance, step_size, covariance.inverse_mass_matrix)
        return jax.tree.map(lambda leaf: _in_dtype(leaf, dtype), state)

    def update(
        self,
        state: WarmupState,
        scheduled: Int[Array, "2"],
        positions: Float[Array, "chains size"],
        acceptance: Float[Array, " chains"],
    ) -> WarmupState:
        """The state after one step of all chains; `scheduled` is its row of the schedule."""
        stage, end = scheduled
        branches = (self._fast, self._slow, lambda state, *_: state)
        new = jax.lax.switch(stage, branches, state, positions, acceptance)
        return jax.lax.switch(end, (lambda state: state, self._end_window, self._end_warmup), new)

    def _fast(self, state: WarmupState, positions: Array, acceptance: Array) -> WarmupState:
        if self.target_accept is None:
            return state
        averaging = jax.vmap(self._averaging()[1])(state.averaging, acceptance)
        new = state._replace(averaging=averaging, step_size=jnp.exp(averaging.log_step_size))
        return _like(state, new)

    def _slow(self, state: WarmupState, positions: Array, acceptance: Array) -> WarmupState:
        _, absorb, _ = self._covariance()

        def one(covariance: Any, position: Array) -> tuple[Any, None]:
            return _like(covariance, absorb(covariance, position)), None

        covariance, _ = jax.lax.scan(one, state.covariance, positions)
        return self._fast(state._replace(covariance=covariance), positions, acceptance)

    def _end_window(self, state: WarmupState) -> WarmupState:
        restart, _, average = self._averaging()
        covariance = self._covariance()[2](state.covariance)
        if self.target_accept is None:
            matrix = covariance.inverse_mass_matrix
            new = state._replace(covariance=covariance, inverse_mass_matrix=matrix)
            return _like(state, new)
        unit = _ratio_of_units(state.inverse_mass_matrix, covariance.inverse_mass_matrix)
        averaging = jax.vmap(lambda one: restart(unit * average(one)))(state.averaging)
        step_size = jnp.exp(averaging.log_step_size)
        new = WarmupState(averaging, covariance, step_size, covariance.inverse_mass_matrix)
        return _like(state, new)

    def _end_warmup(self, state: WarmupState) -> WarmupState:
        if self.target_accept is None:
            return state
        step_size = jax.vmap(self._averaging()[2])(state.averaging)
        return _like(state, state._replace(step_size=step_size))

    def _averaging(self) -> Any:
        init, update, final = dual_averaging_adaptation(self.target_accept or 0.5, gamma=GAMMA)

        def start(step_size: Scalar) -> Any:
            return init(step_size)._replace(mu=jnp.log(step_size))

        return start, update, final

    def _covariance(self) -> Any:
        return mass_matrix_adaptation(is_diagonal_matrix=not self.dense_mass)


def _ratio_of_units(old: Array, new: Array) -> Scalar:
    """What the step size is multiplied by, so that steps under `new` are as long as under `old`.

    The length is the root mean square over coordinates in standard deviations by `new`.
    """
    if new.ndim == 1:
        return jnp.sqrt(jnp.mean(old / new))
    return jnp.sqrt(jnp.trace(jnp.linalg.solve(new, old)) / len(new))


def _in_dtype(leaf: Any, dtype: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)


def _like(old: PyTree[Any], new: PyTree[Any]) -> PyTree[Any]:
    """`new` in the types of `old`, so that a compiled loop can carry it."""
    return jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype), old, new)
