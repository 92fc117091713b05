"""Levels of noise that a cloud goes down, and the noise of the steps between them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Scalar, Sigma


class Levels(NamedTuple):
    """Noise levels `r_0 > ... > r_K = 0` on top of an event that has `sigma_min` itself."""

    r: Float[Array, " steps"]  # where denoisers are evaluated, falling; 0 after the last
    h: Float[Array, " steps"]  # r_k^2 - r_{k+1}^2
    V: Float[Array, " steps"]  # variance of the noise of step k
    start: Scalar  # variance of the noise on the first event

    @classmethod
    def full_noise(cls, sigma_min: Sigma, sigmas: Float[Array, " levels"]) -> "Levels":
        """The Euler-Maruyama chain, `V = h`; the last of `sigmas` is `sigma_min`."""
        squares = (sigmas**2 - sigma_min**2).at[-1].set(0.0)
        h = squares[:-1] - squares[1:]
        return cls(jnp.sqrt(squares[:-1]), h, h, squares[0])

    @classmethod
    def half_noise(cls, sigma_min: Sigma, sigmas: Float[Array, " levels"]) -> "Levels":
        """Half of the noise before each score and half after it, as in `sample.HalfNoise`."""
        r, h, _, start = cls.full_noise(sigma_min, sigmas)
        return cls(r, h, (h + jnp.append(h[1:], 0.0)) / 2, start + h[0] / 2)


__all__ = ["Levels"]
