"""What `FeynmanKac` is after: the chain of a model, and of what guides it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from scoreprior._typing import Event, Scalar
from scoreprior.composition import Composition
from scoreprior.feynman_kac import (
    AbstractControl,
    AbstractNoise,
    AbstractRejuvenation,
    AbstractWeight,
    Composed,
    Levels,
    NoControl,
)
from scoreprior.guide import (
    AbstractCondition,
    AbstractGaussianGuidance,
    AbstractGaussianTwist,
    AbstractTwist,
    Classifier,
    MCGDiff,
    Steering,
)
from scoreprior.guide.twist import ClassifierTwist, DataTwist, EventTwist, SteeringTwist
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.problem.observed import ObservedEvent, PriorEvent, observed_event, only_prior
from scoreprior.sample import LogGrid
from scoreprior.smc.pinned import Coordinates, Pinned
from scoreprior.smc.twisted import Twisted

Guidance = AbstractTwist | AbstractCondition | Classifier | MCGDiff | Steering | None
"""What weights can correct."""

OF_MODEL = AbstractCondition | Classifier | Steering
"""Guidance to whatever the model says of the event, in observed sites and factors."""


class EventLikelihood(eqx.Module):
    """The log likelihood of one event at prior site `site`."""

    problem: Problem
    site: str = eqx.field(static=True)

    def __call__(self, x: Event) -> Scalar:
        return self.problem.log_likelihood({self.site: x})


class Target(NamedTuple):
    """What a run is after: prior site `site` of `problem`, by the chain of a Feynman-Kac model."""

    problem: Problem
    site: str
    chain: Twisted | Composed | Pinned
    data: Any
    prior: ScorePrior | Composition


class Scheme(NamedTuple):
    """The settings of an engine, called `name`, that decide on its chain."""

    name: str
    guidance: Guidance
    num_steps: int
    control: AbstractControl | None
    weight: AbstractWeight
    noise: AbstractNoise
    rejuvenation: AbstractRejuvenation | None
    batch_size: int | None

    def target(self, problem: Problem) -> Target:
        """The chain for `problem`; raises `ValueError` where it is none that can be corrected."""
        guidance = self.guidance
        if isinstance(guidance, MCGDiff):
            return self._pinned(observed_event(problem, f"{self.name}(MCGDiff())"))
        if isinstance(guidance, AbstractTwist) and problem.sites.observed:
            seen = observed_event(problem, self.name, composed=True)
            weighed = self.control is not None or self.weight.needs_energy
            is_free = isinstance(seen.prior, ScorePrior) and not weighed
            if is_free and isinstance(guidance, AbstractGaussianTwist):
                return self._twisted(seen, guidance)
            return self._composed(seen, DataTwist(guidance, seen.observation), _data(seen))
        event = only_prior(problem, self.name)
        data = problem.args, problem.kwargs, problem.sites.params
        if not event.has_data and isinstance(guidance, OF_MODEL):
            raise ValueError(
                f"guidance {type(guidance).__name__} needs an observed site or a factor in the "
                "model, such as numpyro.factor(name, log_probability), got none"
            )
        return self._composed(event, self._twist(event), data, has_data=event.has_data)

    def _twist(self, event: PriorEvent) -> Any:
        guidance, prior = self.guidance, event.prior
        if isinstance(guidance, AbstractCondition):
            return EventTwist(guidance)
        if isinstance(guidance, Classifier):
            priors = prior.priors if isinstance(prior, Composition) else (prior,)
            sigma_min = min(prior.sigma_min for prior in priors)
            dtype = priors[0].flow.moments.mean.dtype
            return ClassifierTwist(guidance, jnp.asarray(sigma_min, dtype))
        if isinstance(guidance, Steering):
            return SteeringTwist(guidance, EventLikelihood(event.problem, event.site))
        return None

    def _twisted(self, seen: ObservedEvent, guidance: AbstractGaussianTwist) -> Target:
        """Moves from the posterior of the next event."""
        flow = seen.prior.flow
        sigmas = LogGrid(flow.sigma_min, flow.sigma_max)(self.num_steps)
        levels = Levels.half_noise(flow.sigma_min, sigmas.astype(flow.moments.mean.dtype))
        settings = guidance, levels, self.batch_size, self.rejuvenation
        chain = Twisted(flow, seen.observation, *settings)
        linear = seen.observation.is_linear(jax.random.key(2))
        if linear and isinstance(guidance, AbstractGaussianGuidance):
            chain = chain.whitened()
        return Target(seen.problem, seen.site, chain, _data(seen), seen.prior)

    def _pinned(self, seen: ObservedEvent) -> Target:
        if self.control is not None or self.rejuvenation is not None or self.weight.needs_energy:
            raise ValueError(
                "control and rejuvenation must be None with MCGDiff(), and weight one that needs "
                "no energy, got one of them"
            )
        flow = seen.prior.flow
        sigmas = LogGrid(flow.sigma_min, flow.sigma_max)(self.num_steps)
        levels = Levels.full_noise(flow.sigma_min, sigmas.astype(flow.moments.mean.dtype))
        coordinates = Coordinates.make(seen.observation, flow.moments.mean)
        chain = Pinned(flow, coordinates, levels, self.batch_size)
        return Target(seen.problem, seen.site, chain, _data(seen), seen.prior)

    def _composed(
        self, event: PriorEvent | ObservedEvent, twist: Any, data: Any, *, has_data: bool = True
    ) -> Target:
        """A chain with the twist along the gradient, for any `prior` of `event`.

        Without data it does not hold the problem, so that its program runs all of its shape.
        """
        problem, site, prior, control = event.problem, event.site, event.prior, self.control
        if isinstance(prior, ScorePrior):
            control = control or NoControl()
            prior = Composition((prior,), (1.0,))
        if self.rejuvenation is not None:
            self.rejuvenation.check(np.asarray(prior.exponents, float).tolist())
        chain = prior.composed(
            self.num_steps,
            weight=self.weight,
            control=control,
            noise=self.noise,
            twist=twist,
            log_likelihood=EventLikelihood(problem, site) if has_data else None,
            batch_size=self.batch_size,
            rejuvenation=self.rejuvenation,
        )
        return Target(problem, site, chain, data, prior)


def _data(seen: ObservedEvent) -> Any:
    return seen.observation.data, seen.observation.noise


__all__ = ["OF_MODEL", "EventLikelihood", "Guidance", "Scheme", "Target"]
