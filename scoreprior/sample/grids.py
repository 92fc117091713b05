"""Grids of decreasing noise levels."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._util import check_count, check_positive


class AbstractGrid(eqx.Module):
    """Decreasing noise levels from `sigma_max` to `sigma_min`; `grid(num_steps)` has one more."""

    sigma_min: float
    sigma_max: float

    def __check_init__(self):
        check_positive("sigma_min", self.sigma_min)
        check_positive("sigma_max", self.sigma_max)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    def __call__(self, num_steps: int) -> Float[Array, " num_levels"]:
        """`num_steps + 1` levels, the first `sigma_max` and the last `sigma_min`."""
        check_count("num_steps", num_steps)
        levels = self.inverse(
            jnp.linspace(self.warp(self.sigma_max), self.warp(self.sigma_min), num_steps + 1)
        )
        return levels.at[0].set(self.sigma_max).at[-1].set(self.sigma_min)

    @abstractmethod
    def warp(self, sigma: float | Array) -> Array:
        """The coordinate in which the grid is even."""

    @abstractmethod
    def inverse(self, coordinate: Array) -> Array:
        """The noise level at a coordinate."""


class LogGrid(AbstractGrid):
    """Even in `log sigma`."""

    def warp(self, sigma: float | Array) -> Array:
        return jnp.log(sigma)

    def inverse(self, coordinate: Array) -> Array:
        return jnp.exp(coordinate)


class EDMGrid(AbstractGrid):
    """Even in `sigma^(1/rho)` (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0

    def warp(self, sigma: float | Array) -> Array:
        return jnp.asarray(sigma) ** (1 / self.rho)

    def inverse(self, coordinate: Array) -> Array:
        return coordinate**self.rho


class ArctanGrid(AbstractGrid):
    """Even in `arctan(sigma / scale)`, `scale` the standard deviation of the data.

    For Gaussian data of that scale the probability flow moves at constant speed along this grid.
    """

    scale: float = eqx.field(kw_only=True)

    def warp(self, sigma: float | Array) -> Array:
        return jnp.arctan(sigma / self.scale)

    def inverse(self, coordinate: Array) -> Array:
        return self.scale * jnp.tan(coordinate)


__all__ = ["AbstractGrid", "ArctanGrid", "EDMGrid", "LogGrid"]
