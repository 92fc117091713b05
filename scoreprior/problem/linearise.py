"""The observation of a model in the form that guided and conjugate engines need.

An observed `Normal` or `MultivariateNormal` site with mean `f(x)` is read as

    y = A x + e,    e ~ N(0, cov_y),    A = df/dx at x_0,    y = data - f(x_0) + A x_0,

exact when `f` is affine. Masked entries carry no information: their rows of `A` and entries of `y`
are zero. A `ComplexNormal` site is read as that of twice as many real data, its real and imaginary
parts on a last axis [*y, 2], which are independent and have one standard deviation.
"""

from functools import singledispatch
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float

from scoreprior._typing import Event, Key
from scoreprior.gaussian import Moments
from scoreprior.likelihood import ComplexNormal
from scoreprior.observation import AbstractObservation
from scoreprior.problem.sites import is_one, peel


class Observation(AbstractObservation):
    """`y = A x + N(0, cov_y)`, as seen from the point `x_0` of prior site `prior` of a `problem`.

    `data` [*y] are the data, 0 where masked; `y` [*y] the same less the affine offset; `noise` is
    `N(0, cov_y)` as `Moments`, dense for multivariate sites and diagonal otherwise; `mask` [*y] is
    true where there are data. Where the noise depends on `x`, it is taken at `x_0`. For complex
    data [*y] stands for [*y, 2].
    """

    problem: Any
    site: str = eqx.field(static=True)
    prior: str = eqx.field(static=True)
    values: dict[str, Array]
    data: Float[Array, "*y"]
    y: Float[Array, "*y"]
    noise: Moments
    mask: Bool[Array, "*y"]

    @property
    def point(self) -> Event:
        """`x_0`, where the mean is linearised."""
        return self.values[self.prior]

    def mean(self, x: Event) -> Float[Array, "*y"]:
        """The mean `f(x)` of the data as the model has it, not linearised; 0 where masked."""
        message = self.problem.trace({**self.values, self.prior: x})[self.site]
        loc, _ = _gaussian(peel(message["fn"])[0], self.site)
        return jnp.where(self.mask, loc, 0.0)

    def A(self, v: Event) -> Float[Array, "*y"]:
        """`A v`: one forward-mode product."""
        return jax.jvp(self.mean, (self.point,), (v,))[1]

    def A_transpose(self, w: Float[Array, "*y"]) -> Event:
        """`A' w`: one reverse-mode product."""
        return jax.vjp(self.mean, self.point)[1](w)[0]

    def matrix(self) -> Float[Array, "m size"]:
        """`A` as a matrix on flattened events."""
        return jax.jacfwd(self.mean)(self.point).reshape(self.y.size, self.point.size)

    def cov_y(self) -> Float[Array, "m m"]:
        """Covariance of the noise as a matrix on flattened data."""
        return self.noise.covariance()

    def is_linear(self, key: Key) -> Bool[Array, ""]:
        """Whether the mean is affine in `x`, to rounding, along a random line through `x_0`."""
        scale = 1 + jnp.sqrt(jnp.mean(self.point**2))
        v = scale * jax.random.normal(key, self.point.shape, self.point.dtype)
        change = jnp.stack([self.mean(self.point + t * v) for t in (-1.0, 0.0, 1.0, 2.0)])
        straight = (
            change[1][None]
            + jnp.array([-1.0, 0.0, 1.0, 2.0]).reshape(4, *(1,) * self.y.ndim) * self.A(v)[None]
        )
        tolerance = jnp.sqrt(jnp.finfo(change.dtype).eps) * jnp.max(jnp.abs(change))
        return jnp.all(jnp.abs(change - straight) <= tolerance)


def observe(problem: Any, values: dict[str, Array], site: str, prior: str) -> Observation:
    """Read `Observation` off observed site `site`, with `values` of all latent sites."""
    values = {name: jnp.asarray(value) for name, value in values.items()}
    message = problem.trace(values)[site]
    if not (message["scale"] is None or is_one(message["scale"])):
        raise ValueError(
            f"observed site {site!r} is under numpyro.handlers.scale, got {message['scale']}: "
            "a scaled likelihood has no noise covariance; scale its standard deviation instead"
        )
    base, mask = peel(message["fn"])
    loc, covariance = _gaussian(base, site)
    data = jnp.asarray(message["value"])
    mask = jnp.broadcast_to(jnp.asarray(mask), data.shape)
    if isinstance(base, ComplexNormal):
        data, mask = _real_imag(data), jnp.stack([mask, mask], -1)
    elif jnp.iscomplexobj(data):
        raise ValueError(
            f"observed site {site!r} has complex data, but its distribution, "
            f"{type(base).__name__}, is one of real numbers: take likelihood.ComplexNormal"
        )
    data = jnp.asarray(data, loc.dtype)
    zero = jnp.zeros(data.shape, data.dtype)
    noise = covariance(zero)
    data = jnp.where(mask, data, 0.0)
    raw = Observation(
        data=data,
        noise=noise,
        problem=problem,
        site=site,
        prior=prior,
        values=values,
        y=zero,
        mask=mask,
    )
    x = raw.point
    offset = raw.mean(x) - raw.A(x)
    return eqx.tree_at(lambda o: o.y, raw, data - offset)


@singledispatch
def _gaussian(distribution: Any, site: str) -> tuple[Array, Any]:
    """Mean of a Gaussian site, and a function from a zero of the shape of the data to the noise."""
    raise ValueError(
        f"observed site {site!r} cannot be linearised: its distribution is "
        f"{type(distribution).__name__}, expected Normal, MultivariateNormal or ComplexNormal; its "
        "log density and gradient are in Problem.log_likelihood"
    )


@_gaussian.register
def _(distribution: dist.Normal, site: str) -> tuple[Array, Any]:
    scale = distribution.scale
    return distribution.loc, lambda zero: Moments(zero, jnp.broadcast_to(scale**2, zero.shape))


@_gaussian.register
def _(distribution: ComplexNormal, site: str) -> tuple[Array, Any]:
    variance = distribution.scale[..., None] ** 2
    return _real_imag(distribution.loc), lambda zero: Moments(
        zero, jnp.broadcast_to(variance, zero.shape)
    )


@_gaussian.register(dist.MultivariateNormal)
@_gaussian.register(dist.LowRankMultivariateNormal)
def _(distribution: Any, site: str) -> tuple[Array, Any]:
    def noise(zero: Array) -> Moments:
        size = zero.shape[-1]
        covariance = jnp.broadcast_to(distribution.covariance_matrix, (*zero.shape, size))
        blocks = covariance.reshape(-1, size, size)
        return Moments.dense(zero, jax.scipy.linalg.block_diag(*blocks))

    return distribution.loc, noise


def _real_imag(z: Array) -> Float[Array, "*z 2"]:
    """Real and imaginary part on a last axis, before which shapes broadcast as those of `z`."""
    return jnp.stack([jnp.real(z), jnp.imag(z)], -1)
