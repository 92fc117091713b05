"""Weights of the steps of a composition, which differ in their error at a finite step."""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

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
    energy: Scalar | None = None  # sum_i beta_i E_i, where the weight needs it
    slope: Scalar | None = None  # div S per entry, estimated without bias, where it needs it

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
    total: Scalar  # sum_i beta_i


class AbstractWeight(eqx.Module):
    """The log weight of a step, and what of it the control sees.

    `needs_energy`: whether `Scores` must have the energy and the slope of the composition.
    `extrapolates`: whether the drift is extrapolated to the middle of the step. `is_rate`: whether
    it is an integral of the rate, which is the same for all noise, and no ratio of kernels.
    """

    needs_energy: ClassVar[bool] = False
    extrapolates: ClassVar[bool] = True
    is_rate: ClassVar[bool] = True

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

    is_rate: ClassVar[bool] = False

    def log_g(self, moved: Moved) -> tuple[Scalar, Scalar, Float[Array, " basis"]]:
        before, after, theta, h, drift, displacement, _ = moved
        ahead = jnp.tensordot(theta, after.bases, 1)
        turned = jnp.sum(displacement * (before.S + ahead - drift))
        squares = jnp.sum(drift**2) - jnp.sum(ahead**2) - before.squares
        # Near-parallel bases would fit the noise of the step by coefficients without bound.
        return turned + h / 2 * squares, *_means(moved)


class EnergyRatio(AbstractWeight):
    """The ratio of the targets and kernels of the step, from energies: exact at any step.

    With `U(x, r) = sum_i beta_i E_i(x, sigma_i)`, the move `M = N(x + h f(x), h)` along
    `f = S + sum_j theta_j b_j`, here not extrapolated, and a backward kernel `L`,

        log G = U(x, r) - U(x', r') + log L(x | x') - log M(x' | x)

    (Del Moral et al. 2006, eq. 12; with energies of diffusion models Thornton et al. 2025,
    "Composition and control with distilled energy diffusion models and sequential Monte Carlo").
    The last law is `exp(-U(x, 0)) / Z` whatever the steps, the scores and the energies between, as
    far as the cloud is large, and the evidence is its `Z`: that of the **unnormalised** energies
    at `sigma_min`, the normaliser of a product of laws where the denoisers are exact, and of no
    meaning by itself for an `EnergyNetwork`. Constants of the energies at other levels cancel.
    Without control the mean of `exp(log_evidence)` is `Z` for any number of particles; `theta`,
    found from the cloud that it moves, adds a bias of order `1 / num_particles`.

    `L` is the law of `x` given `x'` where, about `x'`, all factors are one Gaussian: `S` and `f`
    then have at `r` the values `S_0 = l S(x', r')` and `f_0 = l f(x', r')` and the slopes `-p` and
    `-q`, with `p = l P`, `P` minus the mean slope of `S` at `x'`, `q` likewise of `f`, and
    `l = 1 / (1 + h P / sum_i beta_i)`; so that

        L = N(x' + h (S_0 - c f_0) / (c^2 + h p), h / (c^2 + h p)),       c = 1 - h q.

    Slopes are by the Rademacher probe of the control, one Jacobian-vector product per step, which
    this weight takes without control too; a slope upwards, as between modes, counts as none. By the
    plainer `L = N(x' - h b', h)` log weights of an isotropic Gaussian have a variance of first
    order in the steps, by this one of second. Where slopes differ between directions it stays of
    first order, and weights vary more than those of `Trapezoid`.

    Every factor must have an `energy`, such as an `EnergyNetwork` and exact denoisers have.
    """

    needs_energy: ClassVar[bool] = True
    extrapolates: ClassVar[bool] = False
    is_rate: ClassVar[bool] = False

    def log_g(self, moved: Moved) -> tuple[Scalar, Scalar, Float[Array, " basis"]]:
        before, after, theta, h, drift, displacement, total = moved
        assert before.energy is not None
        assert after.energy is not None
        assert after.slope is not None
        size = displacement.size
        P = jnp.maximum(-after.slope, 0.0)
        lower = 1 / (1 + h * P / total)
        p, q = lower * P, lower * (P - theta @ after.divergence / size)
        c = 1 - h * q
        precision = c**2 + h * p  # of L, times h
        backward = lower * (after.S - c * after.drift(theta)) / precision
        log_ratio = jnp.sum((displacement - h * drift) ** 2)
        log_ratio = log_ratio - precision * jnp.sum((displacement + h * backward) ** 2)
        log_ratio = log_ratio / (2 * h) + size / 2 * jnp.log(precision)
        return before.energy - after.energy + log_ratio, *_means(moved)


def _means(moved: Moved) -> tuple[Scalar, Float[Array, " basis"]]:
    """`h g` and `h H`, means of before and after the step."""
    before, after = moved.before, moved.after
    response = moved.h * (before.response + after.response) / 2
    return moved.h * (before.rate + after.rate) / 2, response


def dots(bases: Float[Array, "basis *event"], x: Event) -> Float[Array, " basis"]:
    """Inner products with one event, [basis]."""
    return bases.reshape(len(bases), x.size) @ x.ravel()


__all__ = [
    "AbstractWeight",
    "EnergyRatio",
    "Euler",
    "KernelRatio",
    "Moved",
    "Scores",
    "Trapezoid",
    "dots",
]
