"""Gaussian maps and laws of the simplest distributions."""

import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm
from numpyro.distributions import constraints
from numpyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    LowerCholeskyAffine,
    ParameterFreeTransform,
)

from scoreprior.denoise import AbstractDenoiser


class _Phi(ParameterFreeTransform):
    domain = constraints.real
    codomain = constraints.unit_interval

    def __call__(self, x):
        return ndtr(x)

    def _inverse(self, y):
        return ndtri(y)

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return norm.logpdf(x)


def gaussianise(distribution):
    base = distribution
    while isinstance(base, dist.Independent | dist.ExpandedDistribution):
        base = base.base_dist
    shape = distribution.shape()
    if isinstance(base, dist.Normal):
        return AffineTransform(
            jnp.broadcast_to(base.loc, shape), jnp.broadcast_to(base.scale, shape)
        )
    if isinstance(base, dist.Uniform):
        low, high = jnp.broadcast_to(base.low, shape), jnp.broadcast_to(base.high, shape)
        return ComposeTransform([_Phi(), AffineTransform(low, high - low)])
    if isinstance(base, dist.MultivariateNormal):
        return LowerCholeskyAffine(base.loc, base.scale_tril)
    if isinstance(base, dist.LogNormal):
        return ComposeTransform([gaussianise(base.base_dist.expand(shape)), *base.transforms])
    return None


def law_of(distribution) -> AbstractDenoiser:
    raise ValueError(f"no law of {type(distribution).__name__} is known")
