"""Hierarchical models: parameters that all observations share, and some of each its own.

With shared `g`, local `l_i` and data `x_i`, independent over `i` given `g`,

    p(g, l_1..n | x_1..n) = p(g | x_1..n) prod_i p(l_i | x_i, g).

The first factor is a composition of `p(g | x_i)`, one network trained with the local parameters
integrated out, which simulating does by itself; the others are one network trained on `l` given
`x` and `g` (Linhart et al. 2024, section 5; Arruda et al. 2025, section 3.3).
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float, PyTree

from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.denoise import Conditioned
from scoreprior.flow import Flow
from scoreprior.infer import infer
from scoreprior.sbi.compose import compose
from scoreprior.sbi.parameters import Parameters
from scoreprior.sbi.posterior import Posterior, check_range, default_solver
from scoreprior.solver import AbstractSolver

BATCH_SIZE = 1024
"""Pairs of a draw and an observation whose local parameters are drawn side by side."""


def joined(x: Float[Array, "*x"], z: Float[Array, " size"]) -> Float[Array, " m"]:
    """What the local network sees: one observation, flattened, and the shared `z` after it."""
    return jnp.concatenate([jnp.ravel(x), z])


def local_data(
    parameters: Parameters, shared: PyTree[Array], x: Float[Array, "n *x"]
) -> Float[Array, "n m"]:
    """`joined` of simulations: the data of an `NPSE` of local parameters.

    `shared` [n, ...] or a dict, the shared parameters of each simulation, whose vector `parameters`
    gives. The prior of that `NPSE` sets its coordinates only: any law with the support of the local
    parameters and about their spread will do where theirs depends on the shared ones.
    """
    z = jax.vmap(parameters.to_vector)(shared)
    return jax.vmap(joined)(jnp.asarray(x, z.dtype), z)


def infer_hierarchical(
    shared: Posterior,
    local: Posterior,
    observations: Sequence[Array] | Array,
    engine: Any,
    *,
    key: Key,
    batch_size: int | None = None,
    **options: Any,
) -> Any:
    """Shared and local parameters given all observations [n, *x], as one `DataTree`.

    **Arguments:** `shared`, the posterior of the shared parameters given one observation; `local`,
    that of the local ones given `joined` data, of the names of other sites; `engine`, such as
    `FeynmanKac(None)`; `batch_size` of `compose`; `options` of `infer`.

    **Returns** the tree of `infer` for the shared parameters, with the vector `z`, whose group
    `posterior` has the local ones too, with an axis `observation`. Each draw of the local
    parameters belongs to the draw of the shared ones: together they are draws of the joint law.

    Raises `ValueError` for no observation, for names that both have, and for a `local` posterior
    that was not trained on `local_data`; warns of draws and data outside its range of training.
    """
    import xarray as xr

    observations = [jnp.asarray(x) for x in observations]
    if not observations:
        raise ValueError("observations must hold at least one, got none")
    common = set(shared.parameters.names) & set(local.parameters.names)
    if common:
        raise ValueError(
            f"shared and local parameters must have names of their own, got {sorted(common)} twice"
        )
    together = jnp.stack(observations)
    _check_local(local, (together[0].size + shared.parameters.size,))
    law = shared.parameters.law
    prior = shared.prior() if law is None else law
    product = compose([shared.condition(x) for x in observations], prior, batch_size=batch_size)

    def model() -> None:
        z = numpyro.sample("z", product)
        for name, value in _named(shared.parameters, shared.parameters.from_vector(z)).items():
            numpyro.deterministic(name, value)

    key_shared, key_local = jax.random.split(key)
    tree = infer(model, engine, key=key_shared, **options)
    z = jnp.asarray(np.asarray(tree.posterior["z"]))
    draws = draw_local(local, z.reshape(-1, z.shape[-1]), together, key=key_local)
    posterior = tree.posterior.to_dataset()
    for name, value in _named(local.parameters, draws).items():
        array = np.asarray(value).reshape(*z.shape[:2], *value.shape[1:])
        rest = [f"{name}_dim_{i}" for i in range(array.ndim - 3)]
        posterior[name] = (("chain", "draw", "observation", *rest), array)
    tree["posterior"] = xr.DataTree(posterior)
    return tree


def draw_local(
    local: Posterior,
    z: Float[Array, "num size"],
    observations: Float[Array, "n *x"],
    *,
    key: Key,
) -> PyTree[Array]:
    """One draw of the local parameters for every shared `z` and observation: leaves [num, n, ...].

    By a flow with the covariance of the local prior about the mean of each posterior. Warns of
    observations and of `z` outside the range of training.
    """
    check_count("observations", len(observations))
    num, n = len(z), len(observations)
    _check_local(local, joined(observations[0], z[0]).shape)
    _check_range(local, z, observations)
    pairs = jnp.repeat(z, n, 0), jnp.tile(observations, (num, *(1,) * (observations.ndim - 1)))
    solver = local.solver or default_solver(local.moments, local.sigma_min)
    draws = _draw_pairs(local, solver, *pairs, jax.random.split(key, num * n))
    return jax.tree.map(lambda leaf: leaf.reshape(num, n, *leaf.shape[1:]), draws)


def _check_local(local: Posterior, shape: tuple[int, ...]) -> None:
    if local.standardise.mean.shape != shape:
        raise ValueError(
            f"local must be trained on local_data, here of shape {shape}, got "
            f"{local.standardise.mean.shape}"
        )


def _check_range(local: Posterior, z: Array, observations: Array) -> None:
    """Warn of observations and of `z` outside the range of training."""
    size, outside = z.shape[1], local.standardise.outside
    of_x = jax.vmap(lambda x: outside(joined(x, z[0]))[:-size])(observations)
    of_z = jax.vmap(lambda z: outside(joined(observations[0], z))[-size:])(z)
    check_range(observations, of_x)
    check_range(z, of_z, name="z")


@eqx.filter_jit
def _draw_pairs(
    local: Posterior, solver: AbstractSolver, z: Array, x: Array, keys: Array
) -> PyTree[Array]:
    def one(pair: tuple[Array, Array, Array]) -> PyTree[Array]:
        z, x, key = pair
        denoiser = Conditioned(local.denoiser, local.context(joined(x, z)))
        # The noise starts about the posterior mean, which is what the denoiser says far out:
        # about the prior's, draws would be off by the distance over sigma_max.
        mean = denoiser(local.moments.mean, jnp.asarray(local.sigma_max, x.dtype))
        moments = eqx.tree_at(lambda m: m.mean, local.moments, mean)
        levels = {"sigma_min": local.sigma_min, "sigma_max": local.sigma_max}
        flow = Flow(denoiser, moments, solver=solver, **levels)
        noise = jax.random.normal(key, flow.event_shape, local.moments.mean.dtype)
        return local.parameters.from_vector(flow.to_data(noise))

    return jax.lax.map(one, (z, x, keys), batch_size=min(BATCH_SIZE, len(keys)))


def _named(parameters: Parameters, theta: PyTree[Array]) -> dict[str, Array]:
    return theta if isinstance(theta, dict) else {parameters.names[0]: theta}


__all__ = ["draw_local", "infer_hierarchical", "joined", "local_data"]
