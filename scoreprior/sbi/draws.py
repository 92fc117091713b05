"""Draws from a prior, `theta_i` of the key and `i` only.

A prior is a NumPyro distribution, whose draws are arrays [*event], or a NumPyro model, a callable
with latent sites and no observed one, whose draws are dicts from site to array.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Int, PyTree
from numpyro.handlers import seed, trace

from scoreprior._typing import Key

Theta = Array | dict[str, Array]
"""One draw from a prior, or several, with a leading axis."""

BLOCK = 1024
"""Draws made at once, always as many: a program of one shape rounds in one way."""


def sampler(prior: Any) -> Callable[[Key], Theta]:
    """The function that makes one draw of `prior` out of a key.

    Raises `TypeError` for what is no prior, and `ValueError` for a distribution with a batch shape,
    for a model with an observed site or without a latent one, and for what no draw can be made of.
    """
    if isinstance(prior, dist.Distribution):
        if prior.batch_shape:
            raise ValueError(
                "prior must be one distribution, of batch shape (), got batch shape "
                f"{prior.batch_shape}: use to_event({len(prior.batch_shape)})"
            )

        def draw(key: Key) -> Theta:
            return prior.sample(key)

    elif callable(prior):
        _check_sites(prior)

        def draw(key: Key) -> Theta:
            sites = trace(seed(prior, key)).get_trace()
            return {name: jnp.asarray(m["value"]) for name, m in sites.items() if _is_latent(m)}

    else:
        raise TypeError(f"prior must be a NumPyro distribution or model, got {prior!r}")
    try:
        jax.eval_shape(draw, jax.random.key(0))
    except Exception as error:
        raise ValueError(f"prior must be one that can be drawn from, got {error!r}") from error
    return draw


def draw_many(draw: Callable[[Key], Theta], key: Key, num: int) -> PyTree[np.ndarray]:
    """`num` draws on the host, leaves [num, ...]; raises `ValueError` unless all are finite."""
    several = eqx.filter_jit(_several)
    blocks = [
        jax.tree.map(np.asarray, several(draw, key, jnp.arange(start, start + BLOCK)))
        for start in range(0, num, BLOCK)
    ]
    theta = jax.tree.map(lambda *rows: np.concatenate(rows)[:num], *blocks)
    for leaf in jax.tree.leaves(theta):
        bad = ~np.isfinite(leaf).reshape(num, -1).all(1)
        if bad.any():
            raise ValueError(
                f"prior must have finite draws, got {bad.sum()} of {num} with NaN or infinity, the "
                f"first is draw {bad.argmax()}"
            )
    return theta


def _several(draw: Callable[[Key], Theta], key: Key, index: Int[Array, " n"]) -> Theta:
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(index)


def _check_sites(model: Callable[..., Any]) -> None:
    try:
        sites = trace(seed(model, jax.random.key(0))).get_trace()
    except Exception as error:
        raise ValueError(
            f"prior must be a model that runs without arguments, got {error!r} from it"
        ) from error
    observed = [name for name, m in sites.items() if m["type"] == "sample" and _is_data(m)]
    if observed:
        raise ValueError(
            f"prior must be a model without observed sites, got {observed}: the simulator draws x"
        )
    if not any(_is_latent(m) for m in sites.values()):
        raise ValueError(
            f"prior must be a model with latent sites, numpyro.sample(name, ...), got {list(sites)}"
        )


def _is_latent(message: dict[str, Any]) -> bool:
    return message["type"] == "sample" and not message["is_observed"]


def _is_data(message: dict[str, Any]) -> bool:
    return message["is_observed"] and not message["infer"].get("is_auxiliary")


__all__ = ["Theta", "draw_many", "sampler"]
