"""Training losses, put together from parts.

Every regression loss for a denoiser is a row of one template,

    L = E  w |D(x_t, sigma) - target(x, x_t, sigma)|^2_lambda  +  regularisers,

with the expectation over data `x`, levels `sigma` and noise, `x_t = x + sigma z`. The four parts
are the law of levels (`levels.py`), the target with its importance weight `w`, the metric
`|.|^2_lambda`, and the regularisers. All act on one event.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreprior._typing import Context, Event, Key, Scalar
from scoreprior._util import check_positive
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.denoise.conservative import products
from scoreprior.gaussian import Moments
from scoreprior.train.levels import AbstractLevels


class Goal(NamedTuple):
    """What the denoiser is drawn to at one event, and how much the event counts."""

    value: Event  # [*event]
    weight: Scalar


class AbstractTarget(eqx.Module):
    """A random event whose weighted mean given `x_t` is the denoiser sought."""

    @abstractmethod
    def __call__(self, x: Event, x_t: Event, sigma: Scalar, context: Context = None) -> Goal:
        """The target for clean `x`, of this context, seen as `x_t` at level `sigma`."""


class Clean(AbstractTarget):
    """The clean event itself: denoising score matching (Vincent, Neural Comput. 23, 2011)."""

    def __call__(self, x: Event, x_t: Event, sigma: Scalar, context: Context = None) -> Goal:
        return Goal(x, jnp.ones_like(sigma))


class TargetScore(AbstractTarget):
    """`(1 - k) x + k (x_t + sigma^2 score(x))`, `k = tau^2 / (tau^2 + sigma^2)`.

    For data whose score `score(x) = grad log p(x)` is known, draws of a posterior for example: less
    variance than `Clean` at low noise (De Bortoli et al., "Target score matching", 2024). `spread`
    is `tau`, the standard deviation *within* a mode; with it the variance is zero for a Gaussian.
    """

    score: Callable[[Event], Event]
    spread: float

    def __check_init__(self) -> None:
        check_positive("spread", self.spread)

    def __call__(self, x: Event, x_t: Event, sigma: Scalar, context: Context = None) -> Goal:
        k = self.spread**2 / (self.spread**2 + sigma**2)
        value = (1 - k) * x + k * (x_t + sigma**2 * self.score(x))
        return Goal(value, jnp.ones_like(sigma))


class Teacher(AbstractTarget):
    """What another denoiser says: distillation, with no noise in the target.

    With metric `|.|^2 / sigma^4` and an `EnergyNetwork` it is `E |grad E_theta + s_teacher|^2`, the
    projection of the teacher's score on gradients (Thornton et al., "Composition and control with
    distilled energy diffusion models and sequential Monte Carlo", AISTATS 2025). Its gradient has
    the mean of that of `Clean` where the teacher is exact, and less variance: none at the optimum,
    if the student can follow.

    **Arguments:** `denoiser`, the teacher; it is not trained.
    """

    denoiser: AbstractDenoiser

    def __call__(self, x: Event, x_t: Event, sigma: Scalar, context: Context = None) -> Goal:
        value = jax.lax.stop_gradient(self.denoiser(x_t, sigma, context))
        return Goal(value, jnp.ones_like(sigma))


class AbstractMetric(eqx.Module):
    """The squared length `|error|^2_lambda` of an error of the denoiser."""

    @abstractmethod
    def __call__(self, error: Event, sigma: Scalar) -> Scalar:
        """One number, non-negative."""


class Residual(AbstractMetric):
    """Mean square of the error in units of a preconditioned network's output.

    `mean_i (R' error)_i^2 (1/lam_i + 1/sigma^2)`: the network of `Network(net, moments)` is trained
    with equal weight in every direction and at every level. For isotropic moments this is the
    weight of Karras et al. (NeurIPS 2022, table 1). Directions with `lam_i = 0` do not count.
    """

    moments: Moments

    def __call__(self, error: Event, sigma: Scalar) -> Scalar:
        lam = self.moments.eigenvalues
        weight = jnp.where(lam > 0, 1 / jnp.where(lam > 0, lam, 1) + 1 / sigma**2, 0)
        return jnp.mean(weight * self.moments.basis.analyse(error) ** 2)


class Relative(AbstractMetric):
    """`|error|^2` in units of what the denoiser of a Gaussian with these moments leaves.

    `|error|^2 / sum_i lam_i sigma^2 / (lam_i + sigma^2)`: one at every level for Gaussian data and
    their denoiser. Every level counts the same, as under `Residual`, but within one each direction
    counts by how far the noise leaves it to be seen, as under `Likelihood`. For spectra that fall
    steeply, where under `Residual` most directions are below the noise at most levels.
    """

    moments: Moments

    def __call__(self, error: Event, sigma: Scalar) -> Scalar:
        lam = self.moments.eigenvalues
        return jnp.sum(error**2) / jnp.sum(lam * sigma**2 / (lam + sigma**2))


class Likelihood(AbstractMetric):
    """`|error|^2 / sigma^2`: integrated over `log sigma`, the bound on the log density.

    Up to a constant, `-log p(x) <= int E|D - x|^2 / sigma^2 dlog sigma` (Song et al., "Maximum
    likelihood training of score-based diffusion models", NeurIPS 2021, corollary 1). With
    `LogUniform` levels the loss is this integral over the length of the interval.
    """

    def __call__(self, error: Event, sigma: Scalar) -> Scalar:
        return jnp.sum(error**2) / sigma**2


class AbstractRegulariser(eqx.Module):
    """A penalty on the denoiser at a noisy event."""

    @abstractmethod
    def __call__(
        self, denoiser: AbstractDenoiser, x_t: Event, sigma: Scalar, context: Context, key: Key
    ) -> Scalar:
        """One number, non-negative."""


class Conservative(AbstractRegulariser):
    """`weight E_v |J'v - J v|^2 / 2d`, `J = dD/dx`: zero if and only if the score is a gradient.

    `E_v |J'v - Jv|^2 = |J - J'|_F^2`, by one Rademacher vector `v` (the penalty of Chao et al., "On
    investigating the conservative property of score-based models", ICML 2023, in a form of smaller
    variance that is never negative).
    """

    weight: float

    def __check_init__(self) -> None:
        check_positive("weight", self.weight)

    def __call__(
        self, denoiser: AbstractDenoiser, x_t: Event, sigma: Scalar, context: Context, key: Key
    ) -> Scalar:
        v = jax.random.rademacher(key, x_t.shape, x_t.dtype)
        forward, backward = products(denoiser, x_t, sigma, context, v)
        return self.weight * jnp.mean((backward - forward) ** 2) / 2


class AbstractLoss(eqx.Module):
    """What `fit` minimises: a function of one event, averaged over a batch."""

    @abstractmethod
    def __call__(
        self, denoiser: AbstractDenoiser, x: Event, u: Scalar, context: Context, *, key: Key
    ) -> Scalar:
        """Loss at event `x`, the noise level being that of quantile `u`, uniform on (0, 1)."""


class DenoisingLoss(AbstractLoss):
    """The template above.

    `DenoisingLoss(LogUniform(0.1, 100.0), Residual(moments))` is the usual choice for
    `Network(net, moments)`.
    """

    levels: AbstractLevels
    metric: AbstractMetric
    target: AbstractTarget = Clean()
    regularisers: tuple[AbstractRegulariser, ...] = ()

    def __call__(
        self, denoiser: AbstractDenoiser, x: Event, u: Scalar, context: Context, *, key: Key
    ) -> Scalar:
        noise_key, *keys = jax.random.split(key, 1 + len(self.regularisers))
        sigma = self.levels(u)
        x_t = x + sigma * jax.random.normal(noise_key, x.shape, x.dtype)
        goal = self.target(x, x_t, sigma, context)
        error = denoiser(x_t, sigma, context) - goal.value
        loss = goal.weight * self.metric(error, sigma)
        for regulariser, k in zip(self.regularisers, keys, strict=True):
            loss = loss + regulariser(denoiser, x_t, sigma, context, k)
        return loss
