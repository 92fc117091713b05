"""Laws of the noise level in training, as maps of a uniform number.

Training feeds them stratified uniforms, one stratum per event of a batch, so that every batch
covers the levels evenly.
"""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.special import ndtri

from scoreprior._typing import Scalar
from scoreprior._util import check_positive


class AbstractLevels(eqx.Module):
    """A law of noise levels, in data units."""

    @abstractmethod
    def __call__(self, u: Scalar) -> Scalar:
        """The level at quantile `u` in (0, 1)."""


class LogUniform(AbstractLevels):
    """`log sigma` uniform between `log sigma_min` and `log sigma_max`."""

    sigma_min: float
    sigma_max: float

    def __check_init__(self) -> None:
        check_positive("sigma_min", self.sigma_min)
        check_positive("sigma_max", self.sigma_max)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    def __call__(self, u: Scalar) -> Scalar:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u


class LogNormal(AbstractLevels):
    """`log sigma` normal about `log median`, with standard deviation `spread`.

    Karras et al. (NeurIPS 2022) take `median = 0.6` and `spread = 1.2` standard deviations of the
    data (`P_mean = -1.2` at a standard deviation of 0.5).
    """

    median: float
    spread: float

    def __check_init__(self) -> None:
        check_positive("median", self.median)
        check_positive("spread", self.spread)

    def __call__(self, u: Scalar) -> Scalar:
        return self.median * jnp.exp(self.spread * ndtri(u))
