"""The denoiser: the one form in which every diffusion model enters the library.

For clean data `X` and noise level `sigma`, a denoiser is the posterior mean

    D(x_t, sigma) = E[X | X + sigma N = x_t],        N ~ N(0, I),

from which follow, by Tweedie's formula (Efron 2011),

    score       s(x_t, sigma) = (D(x_t, sigma) - x_t) / sigma^2
    covariance  Cov[X | x_t]  = sigma^2 dD/dx_t .
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from scoreprior._typing import Array, Context, Event, Float, Key, Scalar, Sigma
from scoreprior._util import check_positive


class AbstractDenoiser(eqx.Module):
    """`D(x, sigma) = E[X | X + sigma N = x]` for one event of any shape; batch with `jax.vmap`."""

    @abstractmethod
    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        """The posterior mean of the clean event, [*event] in data units."""

    @property
    def level_range(self) -> tuple[float | Scalar, float | Scalar]:
        """Smallest and largest `sigma` at which the denoiser is defined, in data units."""
        return 0.0, math.inf

    def score(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        """`grad_x log p_sigma(x) = (D - x) / sigma^2`, for `sigma > 0`."""
        return (self(x, sigma, context) - x) / sigma**2

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        """`-log p_sigma(x)` up to a constant for each `sigma` and context, in nats.

        `score` is minus its gradient. Raises `NotImplementedError` for a denoiser that has none: it
        takes an exact denoiser, an `EnergyNetwork`, or one made of these.
        """
        raise NotImplementedError(no_energy(self))

    def calibrate(
        self,
        data: Float[Array, "n *event"],
        *,
        key: Key,
        sigmas: Float[Array, " num_levels"],
        num_draws: int = 8,
    ) -> "AbstractDenoiser":
        """This denoiser with its mean score made zero at every level; see `calibrate.calibrate`."""
        from scoreprior.denoise.calibrate import calibrate

        return calibrate(self, data, key=key, sigmas=sigmas, num_draws=num_draws)


def energy_of(denoiser: Callable[..., Any]) -> Callable[..., Scalar]:
    """The method `energy` of a denoiser that may be any callable."""
    energy = getattr(denoiser, "energy", None)
    if energy is None:
        raise NotImplementedError(no_energy(denoiser))
    return energy


def no_energy(denoiser: Any) -> str:
    """What is said where an energy is asked of a denoiser that has none."""
    return (
        f"{type(denoiser).__name__} has no energy: its score need not be the gradient of anything. "
        "Distil it into an EnergyNetwork (train.Teacher), or take a density that needs no energy, "
        "FlowDensity()"
    )


class AbstractWrapper(AbstractDenoiser):
    """Made of another `denoiser`, and defined at the noise levels at which that is."""

    denoiser: eqx.AbstractVar[AbstractDenoiser]

    @property
    def level_range(self) -> tuple[float | Scalar, float | Scalar]:
        return self.denoiser.level_range


class Conditioned(AbstractWrapper):
    """A conditional denoiser with its context fixed: an unconditional denoiser."""

    denoiser: AbstractDenoiser
    context: Context

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        if context is not None:
            raise ValueError("context is already fixed in Conditioned; pass context=None")
        return self.denoiser(x, sigma, self.context)

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        if context is not None:
            raise ValueError("context is already fixed in Conditioned; pass context=None")
        return self.denoiser.energy(x, sigma, self.context)


class Rescaled(AbstractDenoiser):
    """The denoiser of `loc + scale X`, for `X` denoised by `denoiser`.

    `D'(x, sigma) = loc + scale D((x - loc) / scale, sigma / scale)`. It moves a network trained in
    its own units, say [-1, 1], to data units, say grey levels; everything after it, densities and
    noise levels included, is in data units. `loc` is a number or [*event]; `scale` one positive
    number, since noise of equal level in all entries must stay so.
    """

    denoiser: AbstractDenoiser
    loc: Event = eqx.field(converter=jnp.asarray)
    scale: Scalar = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        if jnp.ndim(self.scale) != 0:
            raise ValueError(f"scale must be one number, got shape {jnp.shape(self.scale)}")
        check_positive("scale", self.scale)

    @property
    def level_range(self) -> tuple[float | Scalar, float | Scalar]:
        low, high = self.denoiser.level_range
        return low * self.scale, high * self.scale

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        inner = self.denoiser((x - self.loc) / self.scale, sigma / self.scale, context)
        return self.loc + self.scale * inner

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        """`E((x - loc) / scale, sigma / scale)`: without the constant `size log scale`."""
        return self.denoiser.energy((x - self.loc) / self.scale, sigma / self.scale, context)


class Noised(AbstractDenoiser):
    """The denoiser of `X + level N`, for `X` denoised by `denoiser`.

        D'(x, r) = x + r^2 s(x, sigma) = x + (r / sigma)^2 (D(x, sigma) - x)

    with `sigma^2 = r^2 + level^2`: the score of noisy data at noise level `r` is that of clean data
    at `sigma`. At `r = 0` it is `x` itself. The `x` of a model with a `ScorePrior` is such noisy
    data, with `level = sigma_min`. Any callable `denoiser(x, sigma)` will do.
    """

    denoiser: Callable[..., Any]
    level: Scalar = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        check_positive("level", self.level)

    @property
    def level_range(self) -> tuple[float | Scalar, float | Scalar]:
        low, high = getattr(self.denoiser, "level_range", (0.0, math.inf))
        return jnp.sqrt(jnp.maximum(low**2 - self.level**2, 0)), jnp.sqrt(high**2 - self.level**2)

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        above = jnp.sqrt(sigma**2 + self.level**2)
        given = () if context is None else (context,)
        return x + (sigma / above) ** 2 * (self.denoiser(x, above, *given) - x)

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        """`E(x, sqrt(sigma^2 + level^2))`."""
        above = jnp.sqrt(sigma**2 + self.level**2)
        given = () if context is None else (context,)
        return energy_of(self.denoiser)(x, above, *given)
