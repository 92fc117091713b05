"""The noised law of a NumPyro distribution in closed form, as an exact denoiser.

Composition of posteriors divides by the noised prior again and again, so its score must be that of
the very prior that was simulated from. Where it is not known in closed form, `law_of` raises.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IdentityTransform,
    IndependentTransform,
    LowerCholeskyAffine,
    PermuteTransform,
    RecursiveLinearTransform,
    Transform,
)

from scoreprior._typing import Array
from scoreprior.denoise import AbstractExact, Gaussian, GaussianMixture, Uniform
from scoreprior.gaussian import Moments
from scoreprior.sbi.transforms import gaussianise

ELEMENTWISE = AffineTransform, IdentityTransform
LINEAR = (
    *ELEMENTWISE,
    LowerCholeskyAffine,
    PermuteTransform,
    RecursiveLinearTransform,
)


def law_of(distribution: dist.Distribution) -> AbstractExact:
    """The law of `theta + sigma N(0, I)` for `theta` of `distribution`, at every `sigma`.

    `denoise.Gaussian` for Normal, MultivariateNormal, LowRankMultivariateNormal and
    GaussianRandomWalk, and for affine transforms of these; `denoise.Uniform` for Uniform;
    `denoise.GaussianMixture` for MixtureSameFamily and MixtureGeneral of Gaussians; each also
    expanded and with `to_event`.

    Raises `ValueError` for any other law, and for a batch of laws. Densities and scores are in the
    space of `theta` itself; with `gaussianise`, many other laws are Gaussian in other coordinates.
    """
    if not isinstance(distribution, dist.Distribution):
        raise TypeError(f"distribution must be a NumPyro distribution, got {distribution!r}")
    if distribution.batch_shape:
        raise ValueError(
            f"distribution must be one law, got {_name(distribution)} with batch shape "
            f"{distribution.batch_shape}: entries of one event are declared by "
            f".to_event({len(distribution.batch_shape)})"
        )
    leaf, shape = _leaf(distribution), distribution.event_shape
    if isinstance(leaf, dist.Uniform):
        low, high = (jnp.broadcast_to(end, shape) for end in (leaf.low, leaf.high))
        return Uniform(low, high)
    if isinstance(distribution, dist.MixtureSameFamily):
        transforms = [gaussianise(distribution.component_distribution)]
    elif isinstance(distribution, dist.MixtureGeneral):
        transforms = list(map(gaussianise, distribution.component_distributions))
    else:
        transform = gaussianise(distribution)
        if transform is None or not _consists_of(transform, LINEAR):
            raise ValueError(_unknown(distribution))
        return _gaussian(transform, shape)
    known = [t for t in transforms if t is not None and _consists_of(t, LINEAR)]
    if len(known) < len(transforms):
        raise ValueError(_unknown(distribution))
    return _mixture(distribution.mixing_distribution.probs, known, shape)


def _gaussian(transform: Transform, shape: tuple[int, ...]) -> Gaussian:
    zeros = jnp.zeros(shape)
    if _consists_of(transform, ELEMENTWISE):
        mean, scales = _mean_and_scales(transform, zeros)
        return Gaussian(Moments(mean, scales**2))
    mean, factors = _mean_and_factors(transform, zeros[None])
    return Gaussian(Moments.dense(mean[0], factors[0] @ factors[0].T))


def _mixture(
    weights: Array, transforms: list[Transform], shape: tuple[int, ...]
) -> GaussianMixture:
    # One transform of a batch of components, or one for each of them.
    zeros = jnp.zeros((len(weights) // len(transforms), *shape))
    if all(_consists_of(t, ELEMENTWISE) for t in transforms):
        parts = [_mean_and_scales(t, zeros) for t in transforms]
        means, scales = map(jnp.concatenate, zip(*parts, strict=True))
        return GaussianMixture.diagonal(weights, means, scales**2)
    parts = [_mean_and_factors(t, zeros) for t in transforms]
    means, factors = map(jnp.concatenate, zip(*parts, strict=True))
    return GaussianMixture.full(weights, means, factors @ factors.mT)


def _mean_and_scales(transform: Transform, zeros: Array) -> tuple[Array, Array]:
    """Of a map that is affine in each entry."""
    return jax.jvp(transform, (zeros,), (jnp.ones_like(zeros),))


def _mean_and_factors(transform: Transform, zeros: Array) -> tuple[Array, Array]:
    """Of an affine map `z -> m + L z` of each component: `m` [K, *event], `L` [K, size, size]."""
    num, event = len(zeros), zeros[0]
    basis = jnp.eye(event.size, dtype=event.dtype).reshape(event.size, 1, *event.shape)
    mean, slope = jax.linearize(transform, zeros)
    columns = jax.vmap(slope)(jnp.broadcast_to(basis, (event.size, *zeros.shape)))
    return mean, jnp.transpose(columns.reshape(event.size, num, event.size), (1, 2, 0))


def _consists_of(transform: Transform, kinds: tuple[type, ...]) -> bool:
    if isinstance(transform, IndependentTransform):
        return _consists_of(transform.base_transform, kinds)
    if isinstance(transform, ComposeTransform):
        return all(_consists_of(part, kinds) for part in transform.parts)
    return isinstance(transform, kinds)


def _leaf(distribution: dist.Distribution) -> dist.Distribution:
    """What is expanded, and what `to_event` was called on."""
    if isinstance(distribution, dist.Independent | dist.ExpandedDistribution):
        return _leaf(distribution.base_dist)
    return distribution


def _name(distribution: dist.Distribution) -> str:
    leaf = _leaf(distribution)
    parts = []
    if type(leaf) is dist.TransformedDistribution:
        parts = [_name(leaf.base_dist), *(type(t).__name__ for t in leaf.transforms)]
    elif isinstance(leaf, dist.MixtureSameFamily):
        parts = [_name(leaf.component_distribution)]
    elif isinstance(leaf, dist.MixtureGeneral):
        parts = list(map(_name, leaf.component_distributions))
    return f"{type(leaf).__name__}({', '.join(parts)})" if parts else type(leaf).__name__


def _unknown(distribution: dist.Distribution) -> str:
    return (
        f"the noised law of {_name(distribution)} has no closed form here: train a prior score, by "
        "dropping the observation at random, or use coordinates in which the prior is Gaussian, by "
        "sbi.Parameters or sbi.gaussianise"
    )


__all__ = ["law_of"]
