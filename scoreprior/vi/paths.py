"""`Paths`: the mixture of normals that Pathfinder ends with."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array

from scoreprior._typing import Key, PyTree
from scoreprior._util import check_count
from scoreprior.vi.guides import AbstractGuide


class Paths(AbstractGuide):
    """An equal mixture of `num_paths` normals of any covariance, one per path of `Pathfinder`."""

    history_axis: ClassVar[str] = "path"
    num_paths: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_paths", self.num_paths)

    def init(self, key: Key, size: int) -> dict[str, Array]:
        loc = jnp.zeros((self.num_paths, size))
        return {"loc": loc, "scale_tril": jnp.broadcast_to(jnp.eye(size), (*loc.shape, size))}

    def distribution(self, params: PyTree[Any]) -> dist.Distribution:
        normals = dist.MultivariateNormal(params["loc"], scale_tril=params["scale_tril"])
        weights = jnp.full(self.num_paths, 1 / self.num_paths)
        return dist.MixtureSameFamily(dist.Categorical(probs=weights), normals)


__all__ = ["Paths"]
