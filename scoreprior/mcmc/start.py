"""Where chains start: prior draws with a finite log density."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from scoreprior._typing import Key
from scoreprior.problem import Problem

MAX_ATTEMPTS = 20


def start_chains(problem: Problem, init: Callable[..., Any], key: Key, num_chains: int) -> Any:
    """States `init(position, logdensity_fn)` [chain, ...] at prior draws.

    `init` is that of a blackjax algorithm, whose states know their `logdensity`. A draw where it is
    not finite is drawn again, up to 20 times; then `ValueError` says whether the prior or the
    likelihood is to blame.
    """
    states = _draw(problem, init, key, num_chains)
    for attempt in range(1, MAX_ATTEMPTS):
        bad = ~jnp.isfinite(states.logdensity)
        if not bad.any():
            return states
        again = _draw(problem, init, jax.random.fold_in(key, attempt), num_chains)
        states = jax.tree.map(lambda old, new, bad=bad: _where(bad, new, old), states, again)
    bad = ~jnp.isfinite(states.logdensity)
    if bad.any():
        _raise(problem, states.position, bad)
    return states


def _raise(problem: Problem, positions: dict[str, Array], bad: Array) -> None:
    first = jax.tree.map(lambda leaf: leaf[jnp.argmax(bad)], positions)
    raise ValueError(
        f"the log density is not finite at {int(bad.sum())} of {bad.size} starting points, each a "
        f"prior draw tried {MAX_ATTEMPTS} times: at one, log_prior = {problem.log_prior(first)} "
        f"and log_likelihood = {problem.log_likelihood(first)}; check the data for NaN and the "
        "units of the noise, and that the data are possible under prior draws"
    )


def _where(condition: Array, new: Array, old: Array) -> Array:
    return jnp.where(condition.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


@eqx.filter_jit
def _draw(problem: Problem, init: Callable[..., Any], key: Key, num_chains: int) -> Any:
    positions = jax.vmap(problem.initial)(jax.random.split(key, num_chains))
    return jax.vmap(lambda position: init(position, problem.log_density))(positions)
