"""Where chains start: prior draws, values that are given, or draws of a fitted guide.

Starting points are positions of the problem that the engine runs on, in its form. One where the log
density is not finite is drawn again where that can be done, and refused where it cannot.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scoreprior._typing import Key
from scoreprior.problem import Problem

MAX_ATTEMPTS = 20


class AbstractInit(eqx.Module):
    """Where chains start."""

    @abstractmethod
    def positions(self, problem: Problem, key: Key, num_chains: int) -> dict[str, Array]:
        """Positions [chain, *site] of `problem`; raises `ValueError` where they do not fit it."""

    @property
    @abstractmethod
    def max_attempts(self) -> int:
        """How often starting points are drawn before one is refused."""

    @abstractmethod
    def origin(self, bad: np.ndarray) -> str:
        """Where the starting points of the chains `bad` [chain] come from, for a message."""


class PriorDraws(AbstractInit):
    """Chains start at draws from the prior, each tried 20 times."""

    def positions(self, problem: Problem, key: Key, num_chains: int) -> dict[str, Array]:
        return _prior_draws(problem, key, num_chains)

    @property
    def max_attempts(self) -> int:
        return MAX_ATTEMPTS

    def origin(self, bad: np.ndarray) -> str:
        return f"each a prior draw tried {MAX_ATTEMPTS} times"


PRIOR_DRAWS = PriorDraws()


class GivenValues(AbstractInit):
    """Chains start at model-space values, such as draws of a guided sampler or of another engine.

    **Arguments:** `values`, either a mapping from every latent site to an array [n, *site], or the
    posterior of a former run: a `DataTree` with a group `posterior`, or that group, whose chains
    and draws become rows. Other sites are ignored. Of `n` rows, chain `i` of `m` takes row
    `i n // m`, so a row serves several chains where there are fewer rows than chains.

    Raises `ValueError`, naming the site and its shape, for missing sites and arrays that do not
    fit, and, naming the row, for a log density that is not finite.
    """

    values: dict[str, np.ndarray]

    def __init__(self, values: Any):
        self.values = _rows(values)
        lengths = {name: value.shape[:1] for name, value in self.values.items()}
        if len(set(lengths.values())) != 1 or () in lengths.values() or (0,) in lengths.values():
            raise ValueError(
                "values must have one leading axis of the same length, at least 1, in every site; "
                f"got shapes { {name: value.shape for name, value in self.values.items()} }"
            )

    def positions(self, problem: Problem, key: Key, num_chains: int) -> dict[str, Array]:
        sites = {**problem.sites.priors, **problem.sites.latents}
        if missing := [name for name in sites if name not in self.values]:
            raise ValueError(
                f"init must hold values of every latent site, {missing} missing: "
                f"it holds {sorted(self.values)}"
            )
        for name, site in sites.items():
            if self.values[name].shape[1:] != site.shape:
                expected = ", ".join(["n", *map(str, site.shape)])
                raise ValueError(
                    f"init must hold values of site {name!r} of shape [{expected}], "
                    f"got {list(self.values[name].shape)}"
                )
        rows = self._taken(num_chains)
        dtypes = {name: leaf.dtype for name, leaf in _template(problem).items()}
        values = {name: jnp.asarray(self.values[name][rows], dtypes[name]) for name in sites}
        return _unconstrain(problem, values)

    @property
    def max_attempts(self) -> int:
        return 1

    def origin(self, bad: np.ndarray) -> str:
        return f"rows {sorted(set(self._taken(len(bad))[bad].tolist()))} of the values given"

    def _taken(self, num_chains: int) -> np.ndarray:
        num_rows = len(next(iter(self.values.values())))
        return np.arange(num_chains) * num_rows // num_chains


class GuideDraws(AbstractInit):
    """Chains start at draws of a fitted variational guide, each tried 20 times.

    **Arguments:** `guide`, with a method `sample(key, num)` that returns positions [num, *site] of
    the non-centred problem. Raises `TypeError` for a guide without the method, and `ValueError`,
    naming the site and its shape, where what it returns does not fit the problem.
    """

    guide: Any

    def __check_init__(self):
        if not callable(getattr(self.guide, "sample", None)):
            raise TypeError(f"guide must have a method sample(key, num), got {self.guide!r}")

    def positions(self, problem: Problem, key: Key, num_chains: int) -> dict[str, Array]:
        non_centred = replace(problem, is_centred=False)
        drawn = dict(self.guide.sample(key, num_chains))
        template = _template(non_centred)
        if drawn.keys() != template.keys():
            raise ValueError(
                f"init: the guide must draw the sites {sorted(template)}, got {sorted(drawn)}"
            )
        for name, leaf in template.items():
            if jnp.shape(drawn[name]) != (num_chains, *leaf.shape):
                raise ValueError(
                    f"init: the guide must draw positions of site {name!r} of shape "
                    f"{[num_chains, *leaf.shape]}, got {list(jnp.shape(drawn[name]))}"
                )
        positions = {name: jnp.asarray(drawn[name], leaf.dtype) for name, leaf in template.items()}
        if not problem.is_centred:
            return positions
        return _unconstrain(problem, _constrain(non_centred, positions))

    @property
    def max_attempts(self) -> int:
        return MAX_ATTEMPTS

    def origin(self, bad: np.ndarray) -> str:
        return f"each a draw of the guide tried {MAX_ATTEMPTS} times"


def start_chains(
    problem: Problem,
    start: Callable[..., Any],
    key: Key,
    num_chains: int,
    init: AbstractInit = PRIOR_DRAWS,
) -> Any:
    """States `start(position, logdensity_fn)` [chain, ...] where `init` says.

    States have the fields `position` and `logdensity`. A draw where the latter is not finite is
    drawn again; then `ValueError` says whether the prior or the likelihood is to blame.
    """
    states = _states(problem, start, init.positions(problem, key, num_chains))
    for attempt in range(1, init.max_attempts):
        bad = ~jnp.isfinite(states.logdensity)
        if not bad.any():
            return states
        positions = init.positions(problem, jax.random.fold_in(key, attempt), num_chains)
        again = _states(problem, start, positions)
        states = jax.tree.map(lambda old, new, bad=bad: _where(bad, new, old), states, again)
    bad = ~jnp.isfinite(states.logdensity)
    if bad.any():
        _raise(problem, states.position, bad, init.origin(np.asarray(bad)))
    return states


def _raise(problem: Problem, positions: dict[str, Array], bad: Array, origin: str) -> None:
    first = jax.tree.map(lambda leaf: leaf[jnp.argmax(bad)], positions)
    # Compiled, so that NumPyro does not refuse the values before their densities are told.
    log_prior, log_likelihood = (
        jax.jit(f)(first) for f in (problem.log_prior, problem.log_likelihood)
    )
    raise ValueError(
        f"the log density is not finite at {int(bad.sum())} of {bad.size} starting points, "
        f"{origin}: at one, log_prior = {log_prior} "
        f"and log_likelihood = {log_likelihood}; check the data for NaN and the "
        "units of the noise, and that the data are possible under prior draws"
    )


def _rows(values: Any) -> dict[str, np.ndarray]:
    """Arrays [n, *site] by site, out of a mapping of arrays or out of a posterior."""
    if hasattr(values, "children"):  # a DataTree
        if "posterior" not in values.children:
            raise ValueError(f"values must have a group 'posterior', got {list(values.children)}")
        values = values["posterior"].dataset
    if not isinstance(values, Mapping) or not values:
        raise TypeError(
            f"values must be a mapping from sites to arrays, or a posterior, got {values!r}"
        )
    if not hasattr(values, "data_vars"):
        return {str(name): np.asarray(value) for name, value in values.items()}
    rows = {}
    for name, array in values.items():
        if array.dims[:2] != ("chain", "draw"):
            raise ValueError(
                f"values of site {name!r} must have the axes chain and draw first, got {array.dims}"
            )
        rows[str(name)] = array.values.reshape(-1, *array.shape[2:])
    return rows


def _template(problem: Problem) -> dict[str, Any]:
    """Shape and type of a position by site, without any computation."""
    return jax.eval_shape(problem.initial, jax.random.key(0))


def _where(condition: Array, new: Array, old: Array) -> Array:
    return jnp.where(condition.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


@eqx.filter_jit
def _prior_draws(problem: Problem, key: Key, num_chains: int) -> dict[str, Array]:
    return jax.vmap(problem.initial)(jax.random.split(key, num_chains))


@eqx.filter_jit
def _unconstrain(problem: Problem, values: dict[str, Array]) -> dict[str, Array]:
    return jax.vmap(problem.unconstrain)(values)


@eqx.filter_jit
def _constrain(problem: Problem, positions: dict[str, Array]) -> dict[str, Array]:
    return jax.vmap(problem.constrain)(positions)


@eqx.filter_jit
def _states(problem: Problem, start: Callable[..., Any], positions: dict[str, Array]) -> Any:
    return jax.vmap(lambda position: start(position, problem.log_density))(positions)
