"""The conditional denoiser of amortised inference, `D(z, sigma, x) = E[Z | Z + sigma N = z, x]`.

A Gaussian regression of the parameters `z` on the observation stands under the network, which
learns what the regression leaves: for a linear Gaussian model, nothing.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreprior._typing import Context, Event, Key, Scalar, Sigma
from scoreprior.denoise import AbstractDenoiser, Network
from scoreprior.gaussian import Moments
from scoreprior.nn import ResidualMLP
from scoreprior.sbi.embed import DrawItems, Standardise
from scoreprior.train import AbstractLevels, AbstractLoss, Residual


class Observed(NamedTuple):
    """What a conditional denoiser is told: its context.

    `x` [*x], or [max_items, *x] with a `mask` [max_items] where it is a set; `known`, whether it
    is told at all, `None` for a network that always is.
    """

    x: Float[Array, "..."]
    mask: Bool[Array, " max_items"] | None = None
    known: Bool[Array, ""] | None = None


class Regression(eqx.Module):
    """`z | x ~ N(A c + b, C)`, least squares on the standardised features `c` [num_features].

    `weights` `A` [size, num_features], `bias` `b` [size]; `residual`, moments `N(0, C)`. `prior`,
    the moments of `z` alone, holds where there is no observation.
    """

    weights: Float[Array, "size num_features"]
    bias: Float[Array, " size"]
    residual: Moments
    prior: Moments

    @classmethod
    def fit(
        cls, z: Float[Array, "n size"], features: Float[Array, "n num_features"]
    ) -> "Regression":
        """Of pairs; features that are too many for it, over `n / 20`, count as none."""
        num, size = z.shape
        prior = Moments.dense(z.mean(0), jnp.atleast_2d(jnp.cov(z.T)))
        if features.shape[1] > num // 20:
            features = features[:, :0]
        design = jnp.concatenate([features, jnp.ones((num, 1), z.dtype)], 1)
        solution = jnp.linalg.lstsq(design, z)[0]
        residual = z - design @ solution
        covariance = residual.T @ residual / (num - design.shape[1])
        left = Moments.dense(jnp.zeros(size, z.dtype), covariance)
        return cls(solution[:-1].T, solution[-1], left, prior)

    def moments(
        self, features: Float[Array, " num_features"], known: Bool[Array, ""] | None
    ) -> Moments:
        """Those of `z` given the features of one observation, or of `z` alone if not `known`."""
        num = self.weights.shape[1]
        mean = self.weights @ features[:num] + self.bias
        given = Moments(mean, self.residual.eigenvalues, self.residual.basis)
        if known is None:
            return given
        return jax.tree.map(lambda a, b: jnp.where(known, a, b), given, self.prior)


class Told(eqx.Module):
    """What is trained: the embedding of an observation, and the network that is told it.

    `null` [context_size] stands for an observation that is not known.
    """

    embedding: Any
    mlp: ResidualMLP
    null: Float[Array, " context_size"]

    def __call__(self, standardised: Array, context: Observed) -> Float[Array, " context_size"]:
        given = () if context.mask is None else (context.mask,)
        told = self.embedding(standardised, *given)
        return told if context.known is None else jnp.where(context.known, told, self.null)


class Amortised(AbstractDenoiser):
    """`Network` with the moments of the regression at `x`, told an embedding of `x`.

    `level_range` is that of the noise in training, in units of `z`.
    """

    net: Told
    standardise: Standardise
    regression: Regression
    levels: tuple[float, float] = eqx.field(static=True)

    @property
    def level_range(self) -> tuple[float, float]:
        return self.levels

    def moments(self, context: Observed) -> Moments:
        """Gaussian moments of `z` given `x`, by the regression."""
        return self.regression.moments(self.standardise(context.x).ravel(), context.known)

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        if not isinstance(context, Observed):
            raise ValueError(
                f"context must be an Observed, got {type(context).__name__}: take "
                "posterior.condition(x_o), or posterior.context(x_o)"
            )
        told = self.net(self.standardise(context.x), context)
        return Network(self.net.mlp, self.moments(context))(x, sigma, told)


class ConditionalLoss(AbstractLoss):
    """Denoising loss in units of the network's output, under moments that depend on the context.

    `|R' (D(z_t, sigma, x) - z)|^2 (1 / lam_i + 1 / sigma^2)`, averaged over entries, with `lam` and
    `R` those of `denoiser.moments(context)`; see `train.Residual`.
    """

    levels: AbstractLevels

    def __call__(
        self, denoiser: AbstractDenoiser, x: Event, u: Scalar, context: Context, *, key: Key
    ) -> Scalar:
        sigma = self.levels(u)
        noisy = x + sigma * jax.random.normal(key, x.shape, x.dtype)
        metric = Residual(denoiser.moments(context))  # type: ignore[attr-defined]
        return metric(denoiser(noisy, sigma, context) - x, sigma)


class DrawContext(eqx.Module):
    """In training: another subset of a set at every step, and now and then no observation.

    `drop` is the probability of the latter (Ho and Salimans, "Classifier-free diffusion guidance",
    2021).
    """

    drop: float

    def __call__(self, key: Key, context: Observed) -> Observed:
        items, known = jax.random.split(key)
        if context.mask is not None:
            context = context._replace(mask=DrawItems()(items, context.mask))
        if context.known is not None:
            context = context._replace(known=jax.random.bernoulli(known, 1 - self.drop))
        return context
