"""Guidance by a classifier of noisy events, and by a conditional denoiser without one."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreprior._typing import Context, Event, Scalar, Sigma
from scoreprior._util import check_positive
from scoreprior.denoise.base import AbstractDenoiser, AbstractWrapper
from scoreprior.guide.base import as_tree


class ClassifierGuidance(AbstractWrapper):
    """The denoiser of what a classifier recognises (Dhariwal & Nichol 2021).

        D_c = D + scale sigma^2 grad_{x_t} log p(c | x_t)

    For `scale = 1` and the law of `c` given the *noisy* event this is `E[X | x_t, c]`, whatever the
    prior. For any other scale it is the score of `p_sigma(x) p(c | x)^scale` at each level, and
    these laws are not the noised laws of one law of clean data: what a sampler draws with it
    depends on the sampler.

    **Arguments:** `denoiser`; `log_prob(x_t, sigma)`, the classifier of noisy events, a function or
    a callable pytree: a classifier of clean events will not do; `scale`, a factor of its gradient.
    """

    denoiser: AbstractDenoiser
    log_prob: Callable[[Event, Sigma], Scalar] = eqx.field(converter=as_tree)
    scale: Scalar = eqx.field(default=1.0, converter=jnp.asarray)

    def __check_init__(self):
        check_positive("scale", self.scale)

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        slope = jax.grad(lambda x: self.log_prob(x, sigma))(x)
        return self.denoiser(x, sigma, context) + self.scale * sigma**2 * slope


class ClassifierFree(AbstractWrapper):
    """A conditional denoiser, moved away from the unconditional one (Ho & Salimans 2022).

        D_w = D(x) + weight (D(x, context) - D(x))

    so `weight = 1` is the conditional denoiser; the paper's `w` is `weight - 1`. The scores are
    those of `q_1^(1 - weight) q_2^weight` with the noised laws `q_1` of all data and `q_2` of those
    with this context. For other weights these are not the noised laws of one law of clean data:
    what a sampler draws with them depends on the sampler. Two evaluations.

    **Arguments:** `denoiser`, a conditional one; `weight`; `unconditional`, the context for which
    `denoiser` is the unconditional denoiser, such as a vector of zeros kept for that in training.
    """

    denoiser: AbstractDenoiser
    weight: Scalar = eqx.field(converter=jnp.asarray)
    unconditional: Context = None

    def __check_init__(self):
        check_positive("weight", self.weight)

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        plain = self.denoiser(x, sigma, self.unconditional)
        return plain + self.weight * (self.denoiser(x, sigma, context) - plain)
