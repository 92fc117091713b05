"""Guides: families of distributions over the flat, standardised coordinates `z` [size].

A guide is a module of settings, its parameters a pytree of unconstrained arrays made by `init`.
NumPyro gives the distributions, their draws and their densities.
"""

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.example_libraries import stax
from jaxtyping import Array
from numpyro.distributions import transforms
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.distributions.util import vec_to_tril_matrix
from numpyro.nn import AutoregressiveNN

from scoreprior._typing import Key, PyTree
from scoreprior._util import check_count, check_positive

INIT_SCALE = 0.1


class AbstractGuide(eqx.Module):
    """A family of distributions over vectors `z`, one standard deviation of the prior to a unit."""

    has_cheap_density: ClassVar[bool] = True
    """Whether the density of any point costs no more than a draw."""
    history_axis: ClassVar[str] = "step"
    """What the bounds of the fit are numbered by."""

    @abstractmethod
    def init(self, key: Key, size: int) -> PyTree[Any]:
        """Unconstrained parameters to start from, for `size` coordinates."""

    @abstractmethod
    def distribution(self, params: PyTree[Any]) -> dist.Distribution:
        """The member of the family with these parameters, over `z` [size]."""


class MeanField(AbstractGuide):
    """Independent normals, `N(loc_i, scale_i^2)`: two parameters per coordinate.

    It fits conditional rather than marginal variances: for a Gaussian posterior of precision `P`
    the best one has variance `1 / P_ii`, at most the true one. `init_scale` in standard deviations
    of the prior.
    """

    init_scale: float = eqx.field(static=True, default=INIT_SCALE)

    def __check_init__(self):
        check_positive("init_scale", self.init_scale)

    def init(self, key: Key, size: int) -> dict[str, Array]:
        return _location_and_scale(size, self.init_scale)

    def distribution(self, params: PyTree[Any]) -> dist.Distribution:
        return dist.Normal(params["loc"], jnp.exp(params["log_scale"])).to_event(1)


class LowRank(AbstractGuide):
    """A normal with covariance `D (F F' + I) D`, `F` [size, rank] and `D` diagonal.

    For many coordinates with a few directions of strong correlation.
    """

    rank: int = eqx.field(static=True)
    init_scale: float = eqx.field(static=True, default=INIT_SCALE)

    def __check_init__(self):
        check_count("rank", self.rank)
        check_positive("init_scale", self.init_scale)

    def init(self, key: Key, size: int) -> dict[str, Array]:
        # Not zero, where the gradient of the bound with respect to the factor vanishes.
        factor = 0.1 * jax.random.normal(key, (size, self.rank))
        return _location_and_scale(size, self.init_scale) | {"factor": factor}

    def distribution(self, params: PyTree[Any]) -> dist.Distribution:
        scale = jnp.exp(params["log_scale"])
        factor = scale[:, None] * params["factor"]
        return dist.LowRankMultivariateNormal(params["loc"], factor, scale**2)


class FullRank(AbstractGuide):
    """A normal with any covariance `D L L' D`: `D` diagonal, `L` unit lower triangular.

    `size^2 / 2` parameters, those of `L` over `sqrt(size)`, so that a step of Adam, which moves all
    entries at once, moves a draw by as much whatever the size. Exact for a Gaussian posterior.
    """

    init_scale: float = eqx.field(static=True, default=INIT_SCALE)

    def __check_init__(self):
        check_positive("init_scale", self.init_scale)

    def init(self, key: Key, size: int) -> dict[str, Array]:
        lower = jnp.zeros(size * (size - 1) // 2)
        return _location_and_scale(size, self.init_scale) | {"lower": lower}

    def distribution(self, params: PyTree[Any]) -> dist.Distribution:
        unit = jnp.eye(len(params["loc"]))
        if params["lower"].size:
            lower = params["lower"] / jnp.sqrt(len(params["loc"]))
            unit = unit + vec_to_tril_matrix(lower, diagonal=-1)
        scale_tril = jnp.exp(params["log_scale"])[:, None] * unit
        return dist.MultivariateNormal(params["loc"], scale_tril=scale_tril)


class IAF(AbstractGuide):
    """Inverse autoregressive flows (Kingma et al. 2016), then an affine map of every coordinate.

    Not Gaussian: it bends and skews. A draw comes with its density at the cost of one pass; the
    density of any other point takes `size` passes per flow. `num_flows` of them, each a network
    with two hidden layers of `width` units, `max(size, 16)` by default, the order of coordinates
    reversed in between.
    """

    has_cheap_density: ClassVar[bool] = False
    num_flows: int = eqx.field(static=True, default=2)
    width: int | None = eqx.field(static=True, default=None)
    init_scale: float = eqx.field(static=True, default=INIT_SCALE)

    def __check_init__(self):
        check_count("num_flows", self.num_flows)
        if self.width is not None:
            check_count("width", self.width)
        check_positive("init_scale", self.init_scale)

    def init(self, key: Key, size: int) -> dict[str, Any]:
        if size < 2:
            raise ValueError("IAF needs at least two coordinates, got 1: use MeanField()")
        if self.width is not None and self.width < size:
            raise ValueError(f"width must be at least the {size} coordinates, got {self.width}")
        keys = jax.random.split(key, self.num_flows)
        nets = [self._net(size)[0](key, (size,))[1] for key in keys]
        # A tenth of the usual weights: close to the identity to start with.
        nets = jax.tree.map(lambda leaf: 0.1 * leaf, nets)
        return _location_and_scale(size, self.init_scale) | {"nets": nets}

    def distribution(self, params: PyTree[Any]) -> dist.Distribution:
        size = len(params["loc"])
        _, apply = self._net(size)
        flows: list[Any] = []
        for net in params["nets"]:
            flows += [transforms.PermuteTransform(jnp.arange(size)[::-1])] if flows else []
            flows += [InverseAutoregressiveTransform(partial(apply, net))]
        affine = transforms.AffineTransform(params["loc"], jnp.exp(params["log_scale"]))
        base = dist.Normal(jnp.zeros(size), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [*flows, affine])

    def _net(self, size: int) -> Any:
        width = max(size, 16) if self.width is None else self.width
        return AutoregressiveNN(
            size, [width, width], permutation=jnp.arange(size), nonlinearity=stax.Elu
        )


def _location_and_scale(size: int, init_scale: float) -> dict[str, Array]:
    return {"loc": jnp.zeros(size), "log_scale": jnp.full(size, jnp.log(init_scale))}


__all__ = ["IAF", "AbstractGuide", "FullRank", "LowRank", "MeanField"]
