"""Pairs of parameters and data on which networks are trained: given, or drawn of a simulator."""

import os
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.sbi.parameters import Parameters
from scoreprior.sbi.simulate import simulate
from scoreprior.sbi.simulators import AbstractSimulator


class Source(NamedTuple):
    """How simulations are drawn, where a simulator is given instead of them; `None` is not given.

    Arguments of `sbi.simulate`, of which `num_simulations` is `num`.
    """

    num_simulations: int | None = None
    key: Key | None = None
    store: str | os.PathLike[str] | None = None
    progress: bool = True


def pairs(parameters: Parameters, simulations: Any, source: Source) -> tuple[Array, Array]:
    """Vectors `z` [n, size] and finite simulations `x` [n, *x], with a warning for those left out.

    `simulations` are a pair, have the attributes `theta` and `x`, or are a simulator.
    """
    theta, x = _theta_and_x(parameters, simulations, source)
    x = jnp.asarray(x)
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"simulations must hold at least one x, [n, *x], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.zeros(()).dtype)
    for leaf in jax.tree.leaves(theta):
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise ValueError(
                f"theta and x must have as many simulations, got {jnp.shape(leaf)} and {x.shape}"
            )
    is_finite = np.asarray(jnp.isfinite(x.reshape(len(x), -1)).all(1))
    num_bad = int((~is_finite).sum())
    if num_bad == len(x):
        raise ValueError(f"simulations must not all hold NaN or infinite values, got {num_bad}")
    if num_bad:
        warnings.warn(
            f"{num_bad} of {len(x)} simulations hold NaN or infinite values and are left out: the "
            "posterior is that given a finite simulation",
            stacklevel=3,
        )
    z = jax.vmap(parameters.to_vector)(
        jax.tree.map(lambda leaf: jnp.asarray(leaf)[is_finite], theta)
    )
    num_outside = int((~jnp.isfinite(z).all(1)).sum())
    if num_outside:
        raise ValueError(
            f"theta must lie inside the support of the prior, got {num_outside} of {len(z)} draws "
            "at its edge, outside or NaN"
        )
    return z, x[is_finite]


def _theta_and_x(
    parameters: Parameters, simulations: Any, source: Source
) -> tuple[PyTree[Array], Any]:
    if hasattr(simulations, "theta") and hasattr(simulations, "x"):
        _check_unused(simulations, source)
        return simulations.theta, simulations.x
    if isinstance(simulations, tuple) and len(simulations) == 2:
        _check_unused(simulations, source)
        return simulations
    if isinstance(simulations, AbstractSimulator) or callable(simulations):
        return _simulated(parameters, simulations, source)
    raise TypeError(
        "simulations must be the pair (theta, x), have the attributes theta and x, or be a "
        f"simulator, got {type(simulations).__name__}"
    )


def _simulated(
    parameters: Parameters, simulator: Any, source: Source
) -> tuple[PyTree[Array], Array]:
    """Draws of a simulator, each made once."""
    num, key = source.num_simulations, source.key
    if num is None or key is None:
        missing = [name for name in ("num_simulations", "key") if getattr(source, name) is None]
        raise ValueError(
            "num_simulations and key must be given with a simulator, got no "
            f"{' and no '.join(missing)} for {simulator!r}"
        )
    check_count("num_simulations", num)
    made = simulate(
        parameters.prior, simulator, num, key=key, store=source.store, progress=source.progress
    )
    if made.num_pending:
        warnings.warn(
            f"the simulator was interrupted: {len(made)} simulations are trained on, and "
            f"{made.num_pending} of {made.num} were not made",
            stacklevel=5,
        )
    return made.theta, made.x


def _check_unused(simulations: Any, source: Source) -> None:
    names = ("num_simulations", "key", "store")
    given = [name for name in names if getattr(source, name) is not None]
    if given:
        raise ValueError(
            f"{' and '.join(given)} must be given with a simulator only, got simulations of type "
            f"{type(simulations).__name__}"
        )
