"""Twists: how likely the data, or an event, are at a noisy point; what weights a cloud on its way.

`twist(denoise, x, r) -> (tau, direction)`: the log of an approximation of `p(y | x_r)` and the
direction in which it grows, at noise `r` on top of the event. Neither need be right, since weights
correct for both; the better they are, the less the weights vary.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior._util import check_positive
from scoreprior.guide.base import AbstractTwist, Denoise, as_tree
from scoreprior.guide.event import AbstractCondition, EventMoments
from scoreprior.observation import AbstractObservation


class DataTwist(eqx.Module):
    """What a method says of data, and its direction."""

    guidance: AbstractTwist
    observation: AbstractObservation

    def __call__(self, denoise: Denoise, x: Event, r: Scalar) -> tuple[Scalar, Event]:
        return self.guidance.twist(denoise, self.observation, x, r)


class EventTwist(eqx.Module):
    """The probability of a condition, by the moments of `EventGuidance`, and its gradient."""

    condition: AbstractCondition

    def __call__(self, denoise: Denoise, x: Event, r: Scalar) -> tuple[Scalar, Event]:
        moments = EventMoments.make(self.condition, denoise, x, r)
        tau, slope = jax.value_and_grad(self.condition.log_prob)(moments.mean, moments.covariance)
        return tau, moments.pull(slope)


class Steering(eqx.Module):
    """`tau = w(r) log p(y | D(x, r))`: steering by the likelihood of the denoised event.

    Any likelihood, reward or `numpyro.factor` will do: nothing is linearised, and with
    `follow=False` nothing differentiated (Singhal et al. 2025, "A general framework for
    inference-time scaling and steering of diffusion models", whose weight is constant). Here `w =
    1 / (1 + (r / scale)^2)` fades the likelihood in, since at high noise `D` says little of the
    event.

    **Arguments:** `scale`, the noise level, in data units, at which half of the log likelihood
    counts: about the spread of the events given a plausible `D`; `follow`: whether moves go up the
    gradient of `tau`, one vector-Jacobian product of the denoiser per step, or weights do all.
    """

    scale: float
    follow: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_positive("scale", self.scale)


class SteeringTwist(eqx.Module):
    """`Steering` by a given log likelihood of an event."""

    steering: Steering
    log_likelihood: Callable[[Event], Scalar]

    def __call__(self, denoise: Denoise, x: Event, r: Scalar) -> tuple[Scalar, Event]:
        def tau(x: Event) -> Scalar:
            return self.log_likelihood(denoise(x)) / (1 + (r / self.steering.scale) ** 2)

        return jax.value_and_grad(tau)(x) if self.steering.follow else (tau(x), jnp.zeros_like(x))


class Classifier(eqx.Module):
    """`tau = scale log p(c | x_t)`: `ClassifierGuidance` as a twist, for weights to correct.

    The law is that of the model, whose last word on `c` is a `numpyro.factor` or a likelihood of
    clean events. So the classifier of noisy events need not be right, nor agree with it at the last
    level; the better it is, the less the weights vary. One gradient of it per step, and none of the
    denoiser.

    **Arguments:** `log_prob(x_t, sigma)`, a function or a callable pytree, as `ClassifierGuidance`
    has it: `sigma` is the noise level of the denoiser, with `sigma_min` in it; `scale`, a factor.
    """

    log_prob: Callable[[Event, Sigma], Scalar] = eqx.field(converter=as_tree)
    scale: Scalar = eqx.field(default=1.0, converter=jnp.asarray)

    def __check_init__(self):
        check_positive("scale", self.scale)


class ClassifierTwist(eqx.Module):
    """A `Classifier` of events that have noise of level `sigma_min` themselves."""

    classifier: Classifier
    sigma_min: Scalar

    def __call__(self, denoise: Denoise, x: Event, r: Scalar) -> tuple[Scalar, Event]:
        def tau(x: Event) -> Scalar:
            sigma = jnp.sqrt(r**2 + self.sigma_min**2)
            return self.classifier.scale * self.classifier.log_prob(x, sigma)

        return jax.value_and_grad(tau)(x)


__all__ = [
    "Classifier",
    "ClassifierTwist",
    "DataTwist",
    "EventTwist",
    "Steering",
    "SteeringTwist",
]
