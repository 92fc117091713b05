"""Bounds on the log evidence, estimated by NumPyro with reparameterised gradients.

With `K` draws `z_k` of the guide `q` and `w_k = p(y, z_k) / q(z_k)`,

    ELBO    mean_k log w_k        (K only lowers the variance of the estimate)
    IWELBO  log mean_k w_k        (K tightens the bound; Burda, Grosse & Salakhutdinov 2016)

and `E[ELBO] <= E[IWELBO] <= log p(y)`.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.handlers import block
from numpyro.infer import RenyiELBO, Trace_ELBO

from scoreprior._typing import Key, PyTree, Scalar
from scoreprior._util import check_count
from scoreprior.vi.guides import AbstractGuide


class AbstractBound(eqx.Module):
    """A lower bound on the log evidence to be raised."""

    num_particles: eqx.AbstractVar[int]
    drops_score: ClassVar[bool]
    """Whether the gradient may leave out the score of the guide, whose expectation vanishes."""

    @abstractmethod
    def numpyro(self) -> Any:
        """NumPyro's loss, minus the bound."""


class ELBO(AbstractBound):
    """The evidence lower bound, a mean over `num_particles` draws.

    Where the guide has a cheap density, the gradient sticks the landing (Roeder, Wu & Duvenaud
    2017): `log q(z)` is differentiated through `z` alone, which leaves out a term of mean zero, so
    the gradient has no noise at all once the guide is the posterior.
    """

    num_particles: int = eqx.field(static=True, default=8)
    drops_score: ClassVar[bool] = True

    def __check_init__(self):
        check_count("num_particles", self.num_particles)

    def numpyro(self) -> Any:
        return Trace_ELBO(num_particles=self.num_particles)


class IWELBO(AbstractBound):
    """The importance-weighted bound with `num_particles` draws.

    Its guide covers the posterior rather than sitting inside: better for reweighting, worse as an
    approximation by itself. The gradient gets noisier with `num_particles` (Rainforth et al. 2018).
    """

    num_particles: int = eqx.field(static=True, default=8)
    drops_score: ClassVar[bool] = False  # its expectation does not vanish here

    def __check_init__(self):
        check_count("num_particles", self.num_particles, least=2)

    def numpyro(self) -> Any:
        return RenyiELBO(alpha=0, num_particles=self.num_particles)


def estimate(
    bound: AbstractBound,
    guide: AbstractGuide,
    params: PyTree[Any],
    log_density: Callable[[Array], Scalar],
    key: Key,
) -> Scalar:
    """One estimate of the bound on `log int exp(log_density(z)) dz`, differentiable in `params`."""
    distribution = guide.distribution(params)
    if bound.drops_score and guide.has_cheap_density:
        frozen = guide.distribution(jax.lax.stop_gradient(params))
        distribution = _Landing(distribution, frozen)
    support = dist.constraints.real_vector

    def model() -> None:
        z = numpyro.sample("z", dist.ImproperUniform(support, (), distribution.event_shape))
        with block():  # the sites of the user's model are none of this one's
            value = log_density(z)
        numpyro.factor("target", value)

    def numpyro_guide() -> None:
        numpyro.sample("z", distribution)

    return -bound.numpyro().loss(key, {}, model, numpyro_guide)


class _Landing(dist.Distribution):
    """Draws of one distribution with the density of another, its twin without derivatives."""

    support = dist.constraints.real_vector

    def __init__(self, live: dist.Distribution, frozen: dist.Distribution):
        self.live, self.frozen = live, frozen
        super().__init__(live.batch_shape, live.event_shape, validate_args=False)

    def sample(self, key: Key | None, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.live.sample(key, sample_shape)

    def log_prob(self, value: Array) -> Array:
        return self.frozen.log_prob(value)


__all__ = ["ELBO", "IWELBO", "AbstractBound", "estimate"]
