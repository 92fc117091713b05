"""Bijections that make a NumPyro distribution standard normal, or a blurred box.

For a continuous law with distribution function `F` on the real line, `theta = F^-1(Phi(z))` has
that law when `z ~ N(0, 1)` (the probability integral transform; Rosenblatt, Ann. Math. Stat. 23,
1952, in one dimension). In the coordinates `z` the prior is a Gaussian, whose noised law, score and
Tweedie covariance are known at every level.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import (
    AbsTransform,
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    LowerCholeskyAffine,
    Transform,
)

from scoreprior._typing import Array
from scoreprior.sbi import soft
from scoreprior.sbi.quantiles import normal_score, quantile
from scoreprior.sbi.tails import log_normal


class _OfLaw(Transform):
    """A bijection from real numbers to the support of `law`, entry by entry."""

    domain = constraints.real

    def __init__(self, law: dist.Distribution):
        self.law = law

    @property
    def codomain(self) -> Any:
        return self.law.support

    @property
    def sign(self) -> float:
        return 1.0

    def tree_flatten(self) -> Any:
        return (self.law,), (("law",), {})

    def eq(self, other: object, static: bool = False) -> Any:
        if not isinstance(other, type(self)):
            return False
        (mine, mine_of), (its, its_of) = jax.tree.flatten(self.law), jax.tree.flatten(other.law)
        if mine_of != its_of:
            return False
        same = [jnp.array_equal(a, b) for a, b in zip(mine, its, strict=True)]
        return all(map(bool, same)) if static else jnp.all(jnp.array(same))


class ProbabilityIntegral(_OfLaw):
    """`theta = F^-1(Phi(z))`, entry by entry, for `F` the distribution function of `law`.

    `log |dtheta/dz| = log N(z; 0, 1) - log p(theta)`. The inverse `Phi^-1(F(theta))` is infinite at
    the ends of the support and NaN beyond them. Where `theta` is too close to an end for its dtype,
    it rounds to the end, and the way back is infinite.

    Both tails are precise for Beta, Cauchy, Exponential, Gamma, Gompertz, Gumbel, HalfCauchy,
    HalfNormal, Laplace, Logistic, SoftLaplace, StudentT, Uniform, Weibull and truncated Normal
    laws. Any other law uses its own `icdf` and `cdf`, and `theta` is the upper end, possibly
    infinite, once `Phi(z)` rounds to one: from `z = 5.4` in single precision, from 8.3 in double.
    Quantiles of Beta, Gamma and StudentT are solved for; they are differentiable in `z`, those of
    Gamma in its parameters too, and the other two raise there.

    **Arguments:** `law`, a continuous NumPyro distribution of scalars, of any batch shape.
    """

    def __call__(self, x: Any) -> Array:
        return quantile(self.law, _floating(x))

    def _inverse(self, y: Any) -> Array:
        y = _floating(y)
        return jnp.where(self.law.support(y), normal_score(self.law, y), jnp.nan)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Array:
        return log_normal(_floating(x)) - self.law.log_prob(y)


class SoftUniform(_OfLaw):
    """From `z` of law `U(-a, a) + b N(0, 1)` to a uniform `law`, entry by entry.

    Straight inside the box and soft at its edges: `theta = low + (high - low) F(z)`, with `F` the
    distribution function of `z`, `b = 0.1`, and `a` such that the variance is one. The prior of `z`
    is `denoise.BlurredUniform`. In Gaussian coordinates a likelihood of one width everywhere has a
    width that depends on where it is, and a network must learn that; here it does not, but for `b`
    of the edges.

    The inverse is infinite at the ends of the support and NaN beyond them. Where `theta` is too
    close to an end for its dtype, it rounds to the end, and the way back is infinite.

    **Arguments:** `law`, a `Uniform` of any batch shape.
    """

    def __call__(self, x: Any) -> Array:
        x = _floating(x)
        part = (self.law.high - self.law.low) * soft.share_of(x)
        return jnp.where(x < 0, self.law.low + part, self.law.high - part)

    def _inverse(self, y: Any) -> Array:
        y = _floating(y)
        below, above = y - self.law.low, self.law.high - y
        is_low = below < above
        z = soft.from_share(jnp.where(is_low, below, above) / (self.law.high - self.law.low))
        return jnp.where(self.law.support(y), jnp.where(is_low, z, -z), jnp.nan)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Array:
        return soft.log_density(_floating(x)) + jnp.log(self.law.high - self.law.low)


def gaussianise(distribution: dist.Distribution) -> Transform | None:
    """The bijection `T` with `T(z)` of this law for `z ~ N(0, I)`, of the same shape as an event.

    Affine for Gaussians; for a `TransformedDistribution`, its own transforms after that of its
    base; `ProbabilityIntegral` for independent scalars whose distribution function and quantiles
    are known. `None` where none of these exists: mixtures, discrete laws, laws whose draws have
    other dimensions than their Gaussian.
    """
    return _transform(distribution, ProbabilityIntegral)


def soften(distribution: dist.Distribution) -> Transform | None:
    """As `gaussianise`, for a law made of uniform ones alone, with `SoftUniform` instead.

    `None` for any other law.
    """
    leaf = distribution
    while isinstance(
        leaf, dist.Independent | dist.ExpandedDistribution | dist.TransformedDistribution
    ):
        leaf = leaf.base_dist
    return _transform(distribution, SoftUniform) if isinstance(leaf, dist.Uniform) else None


def _transform(
    distribution: dist.Distribution, kind: Callable[[dist.Distribution], Transform]
) -> Transform | None:
    """The transform of a distribution, that of its scalars by `kind`."""
    if not isinstance(distribution, dist.Distribution):
        raise TypeError(f"distribution must be a NumPyro distribution, got {distribution!r}")
    if isinstance(distribution, dist.Independent):
        base = _transform(distribution.base_dist, kind)
        ndims = distribution.reinterpreted_batch_ndims
        return None if base is None else IndependentTransform(base, ndims)
    if isinstance(distribution, dist.ExpandedDistribution):
        return _transform(distribution.base_dist, kind)
    if isinstance(distribution, dist.Normal):
        return AffineTransform(*map(_floating, (distribution.loc, distribution.scale)))
    if isinstance(distribution, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return LowerCholeskyAffine(distribution.loc, distribution.scale_tril)
    if isinstance(distribution, dist.GaussianRandomWalk):
        num, scale = distribution.num_steps, _floating(distribution.scale)[..., None, None]
        steps = jnp.tril(jnp.ones((num, num), scale.dtype))
        return LowerCholeskyAffine(jnp.zeros(num, scale.dtype), scale * steps)
    if isinstance(distribution, dist.TransformedDistribution):
        return _transformed(distribution, kind)
    return kind(distribution) if _has_quantiles(distribution) else None


def _transformed(
    distribution: dist.TransformedDistribution, kind: Callable[[dist.Distribution], Transform]
) -> Transform | None:
    shape = (*distribution.batch_shape, *distribution.event_shape)
    parts, base = distribution.transforms, _transform(distribution.base_dist, kind)
    keeps_shape = ComposeTransform(parts).inverse_shape(shape) == shape
    if base is None or not keeps_shape or any(map(_folds, parts)):
        return None
    return ComposeTransform([base, *parts])


def _floating(value: Any) -> Array:
    return jnp.asarray(value, jnp.result_type(value, float))


def _folds(transform: Transform) -> bool:
    """Whether an `AbsTransform` is among these: it has an inverse method, and is no bijection."""
    if isinstance(transform, IndependentTransform):
        return _folds(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return any(map(_folds, transform.parts))
    return isinstance(transform, AbsTransform)


def _has_quantiles(law: dist.Distribution) -> bool:
    """Whether `law` is a continuous law of scalars that says its `cdf` and `icdf`."""
    if law.event_shape or law.support is None or law.is_discrete:
        return False
    if quantile.dispatch(type(law)) is not quantile.dispatch(object):
        return True
    half = jnp.full(law.batch_shape, 0.5)
    try:
        jax.eval_shape(lambda q: law.cdf(law.icdf(q)), half)
    # Those quantiles that NumPyro leaves to a package which is not there raise `ImportError`.
    except (NotImplementedError, ImportError):
        return False
    return True


__all__ = ["ProbabilityIntegral", "SoftUniform", "gaussianise", "soften"]
