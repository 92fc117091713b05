"""The noise of the moves of a composition, and the drift that goes with it.

With `zeta^2` times the noise that a step takes from the levels, a move along

    x' = x + h ((1 + zeta^2) / 2 S + b) + zeta sqrt(h) n

has the same rate of the log weight for every `zeta` (Skreta et al. 2025, "Feynman-Kac correctors in
diffusion", section 3, of annealing; the divergences cancel for products too).
"""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp

from scoreprior._typing import Scalar


class AbstractNoise(eqx.Module):
    """How much noise the moves of a composition have."""

    @abstractmethod
    def variance(self, total: Scalar) -> Scalar:
        """`zeta^2`, with `total = sum_i beta_i`."""


class TargetScore(AbstractNoise):
    """`zeta = 1`: moves along `S`, the score of the target, where all exponents are one."""

    def variance(self, total: Scalar) -> Scalar:
        return jnp.ones_like(total)


class TemperedNoise(AbstractNoise):
    """`zeta^2 = 1 / sum_i beta_i`: less noise at a low temperature.

    Without `VarianceControl` it loses mass, and the effective sample size does not tell: a Gaussian
    cloud comes down narrower than its target. With it, it is as good as `TargetScore`.
    """

    def variance(self, total: Scalar) -> Scalar:
        return 1 / total


__all__ = ["AbstractNoise", "TargetScore", "TemperedNoise"]
