"""Weights of the steps of a composition, which differ in their error at a finite step."""

from abc import abstractmethod
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event, Scalar


class Scores(NamedTuple):
    """What is known of a composition at a point and a level."""

    S: Event  # sum_i beta_i s_i, [*event]
    squares: Scalar  # sum_i beta_i |s_i|^2
    bases: Float[Array, "basis *event"]  # drifts b_j of the control
    divergence: Float[Array, " basis"]  # div b_j, estimated without bias

    @property
    def rate(self) -> Scalar:
        """`g = (|S|^2 - sum_i beta_i |s_i|^2) / 2`, the rate of the log weight without control."""
        return (jnp.sum(self.S**2) - self.squares) / 2

    @property
    def response(self) -> Float[Array, " basis"]:
        """`H_j = S . b_j + div b_j`."""
        return dots(self.bases, self.S) + self.divergence

    def drift(self, theta: Float[Array, " basis"]) -> Event:
        """`S + sum_j theta_j b_j`."""
        return self.S + jnp.tensordot(theta, self.bases, 1)


class Moved(NamedTuple):
    """A step of one particle."""

    before: Scores
    after: Scores
    theta: Float[Array, " basis"]
    h: Scalar
    drift: Event  # by which the particle moved, that of the twist apart
    displacement: Event


class AbstractWeight(eqx.Module):
    """The log weight of a step, and what of it the control sees."""

    @abstractmethod
    def log_g(self, moved: Moved) -> tuple[Scalar, Scalar, Float[Array, " basis"]]:
        """The log weight, `h g` and `h H`; the noise of the step is in the first alone."""


class Euler(AbstractWeight):
    """`h (g + theta . H)` before the step. Error of first order, and large."""

    def log_g(self, moved: Moved) -> tuple[Scalar, Scalar, Float[Array, " basis"]]:
        rate, response = moved.h * moved.before.rate, moved.h * moved.before.response
        return rate + moved.theta @ response, rate, response


class Trapezoid(AbstractWeight):
    """The mean of `h (g + theta . H)` before and after the step, at no further evaluation.

    With `VarianceControl` the error is of second order, as far as measured.
    """

    def log_g(self, moved: Moved) -> tuple[Scalar, Scalar, Float[Array, " basis"]]:
        rate, response = _means(moved)
        return rate + moved.theta @ response, rate, response


class KernelRatio(AbstractWeight):
    """The ratio of the kernels of the step (He et al. 2025, "RNE: plug-and-play diffusion").

    With `P_i = N(x + h s_i, h)` the reverse step of factor `i`, `F = N(x', h)` its noising,
    `M = N(x + h a, h)` the move, of drift `a`, and `L = N(x' - h b', h)` the noising that goes with
    it,

        log G = sum_i beta_i (log P_i - log F) + log L - log M,

    which needs no divergence. For exponents that sum to one it is exact for factors that are
    points; otherwise its error is of first order, as that of `Euler`, with which it agrees where
    `a = S`. Moves here are along an extrapolated drift, which it corrects for, at the cost of
    noise; and with `VarianceControl` the error stays of first order, while `Trapezoid` has second.
    """

    def log_g(self, moved: Moved) -> tuple[Scalar, Scalar, Float[Array, " basis"]]:
        before, after, theta, h, drift, displacement = moved
        ahead = jnp.tensordot(theta, after.bases, 1)
        turned = jnp.sum(displacement * (before.S + ahead - drift))
        squares = jnp.sum(drift**2) - jnp.sum(ahead**2) - before.squares
        # Near-parallel bases would fit the noise of the step by coefficients without bound.
        return turned + h / 2 * squares, *_means(moved)


def _means(moved: Moved) -> tuple[Scalar, Float[Array, " basis"]]:
    """`h g` and `h H`, means of before and after the step."""
    before, after = moved.before, moved.after
    response = moved.h * (before.response + after.response) / 2
    return moved.h * (before.rate + after.rate) / 2, response


def dots(bases: Float[Array, "basis *event"], x: Event) -> Float[Array, " basis"]:
    """Inner products with one event, [basis]."""
    return bases.reshape(len(bases), x.size) @ x.ravel()


__all__ = ["AbstractWeight", "Euler", "KernelRatio", "Moved", "Scores", "Trapezoid", "dots"]
