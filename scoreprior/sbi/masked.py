"""Denoisers of some entries of a vector given the others, as a mask says, and their training.

A mask says which entries of a vector `v` are observed; a network denoises the others given those,
after Gloeckler et al., "All-in-one simulation-based inference" (ICML 2024), with a residual
perceptron in place of a transformer and a Gaussian under it:

    D(v, sigma, m) = m + C (C + S)^-1 (v - m) + diag(t) F,     S_i = 0 if observed, else sigma^2

for the joint Gaussian `N(m, C)`, exact for a linear Gaussian model, with `t` the standard
deviations that this Gaussian leaves.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float, Int

from scoreprior._typing import Context, Event, Key, Scalar, Sigma
from scoreprior.denoise import AbstractDenoiser
from scoreprior.denoise.base import AbstractWrapper
from scoreprior.nn import ResidualMLP
from scoreprior.train import AbstractLevels, AbstractLoss


class Masked(NamedTuple):
    """What is observed of a joint vector: `value` [size] where `observed` [size]."""

    value: Float[Array, " size"]
    observed: Bool[Array, " size"]


class DrawMask(eqx.Module):
    """Masks of training, each kind with probability 1/5 (Gloeckler et al. 2024, section 3.3).

    Nothing observed; the data; the parameters; every entry with probability 0.3, or 0.7. Where all
    would be observed, none is.
    """

    num_parameters: int = eqx.field(static=True)

    def __call__(self, key: Key, value: Float[Array, " size"]) -> Masked:
        kind, few, many = jax.random.split(key, 3)
        is_data = jnp.arange(value.size) >= self.num_parameters
        masks = jnp.stack(
            [
                jnp.zeros(value.size, bool),
                is_data,
                ~is_data,
                jax.random.bernoulli(few, 0.3, (value.size,)),
                jax.random.bernoulli(many, 0.7, (value.size,)),
            ]
        )
        mask = masks[jax.random.randint(kind, (), 0, len(masks))]
        return Masked(value, mask & ~mask.all())


class JointDenoiser(AbstractDenoiser):
    """The formula above: observed entries go in and come out as they are.

    `moments` of the joint vector; `levels`, those of the noise in training.
    """

    net: ResidualMLP
    mean: Float[Array, " size"]
    covariance: Float[Array, "size size"]
    levels: tuple[float, float] = eqx.field(static=True)

    @property
    def level_range(self) -> tuple[float, float]:
        return self.levels

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        if not isinstance(context, Masked):
            raise ValueError(f"context must be a Masked, got {type(context).__name__}")
        x = jnp.where(context.observed, context.value, x)
        gaussian, spread = self.gaussian(x, sigma, context.observed)
        variance = jnp.where(context.observed, 0, sigma**2) + jnp.diagonal(self.covariance)
        whitened = (x - self.mean) / jnp.sqrt(variance)
        level = jnp.log(jnp.asarray(sigma)) / 4
        output = self.net(whitened, level, context.observed.astype(x.dtype))
        return jnp.where(context.observed, context.value, gaussian + spread * output)

    def gaussian(
        self, x: Event, sigma: Sigma, observed: Bool[Array, " size"]
    ) -> tuple[Event, Event]:
        """Mean and standard deviations of the clean vector if it were Gaussian, [size] each."""
        # Observed entries have the smallest noise that leaves the matrix well conditioned.
        tiny = 1e-5 * jnp.mean(jnp.diagonal(self.covariance))
        noise = jnp.where(observed, tiny, sigma**2)
        factor = cho_factor(self.covariance + jnp.diag(noise), lower=True)
        gain = cho_solve(factor, self.covariance).T
        mean = self.mean + gain @ (x - self.mean)
        # C - C (C + S)^-1 C = C (C + S)^-1 S, whose diagonal has no cancellation.
        return mean, jnp.sqrt(jnp.diagonal(gain) * noise)


class JointLoss(AbstractLoss):
    """Denoising loss of the entries that are not observed, in units of the network's output."""

    levels: AbstractLevels

    def __call__(
        self, denoiser: AbstractDenoiser, x: Event, u: Scalar, context: Context, *, key: Key
    ) -> Scalar:
        sigma = self.levels(u)
        noisy = x + sigma * jax.random.normal(key, x.shape, x.dtype)
        observed = context.observed  # type: ignore[union-attr]
        _, spread = denoiser.gaussian(noisy, sigma, observed)  # type: ignore[attr-defined]
        error = (denoiser(noisy, sigma, context) - x) / spread
        return jnp.mean(jnp.where(observed, 0.0, error**2))


class Unobserved(AbstractWrapper):
    """A joint denoiser with its observed entries fixed: that of the entries `index` [k]."""

    denoiser: AbstractDenoiser
    context: Masked
    index: Int[Array, " k"]

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        if context is not None:
            raise ValueError("context is already fixed in Unobserved; pass context=None")
        value = self.context.value.at[self.index].set(x)
        return self.denoiser(value, sigma, self.context)[self.index]
