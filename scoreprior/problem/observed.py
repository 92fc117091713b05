"""What samplers along noise levels ask of a model: one event, seen in known Gaussian noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scoreprior._typing import Event, Key
from scoreprior.composition import Composition
from scoreprior.gaussian import Moments
from scoreprior.observation import AbstractObservation
from scoreprior.prior import ScorePrior
from scoreprior.problem.linearise import Observation
from scoreprior.problem.sites import peel

ADVICE = "SGLD, SGHMC and SVGD take any model, as NUTS does in the non-centred form"


class Observed(NamedTuple):
    """Prior site `site` of a `problem` in the centred form, its law, and what is seen of it.

    `shape` is that of the site: one event of the prior, or under plates several.
    """

    problem: Any
    site: str
    shape: tuple[int, ...]
    prior: ScorePrior
    observation: Observation


class ObservedEvent(NamedTuple):
    """Prior site `site` of a `problem`, one event, and what is seen of it, masked entries apart."""

    problem: Any
    site: str
    prior: ScorePrior
    observation: "Observation | Unmasked"


class Unmasked(AbstractObservation):
    """The entries `index` [m] of flattened data: those that are not masked."""

    observation: Observation
    index: Int[Array, " m"]
    data: Float[Array, " m"]
    noise: Moments

    def mean(self, x: Event) -> Float[Array, " m"]:
        return self.observation.mean(x).ravel()[self.index]

    def is_linear(self, key: Key) -> Bool[Array, ""]:
        """Whether the mean is affine in the event, as for `Observation`."""
        return self.observation.is_linear(key)


def _unmasked(observation: Observation) -> Observation | Unmasked:
    """`observation` without masked entries, whose densities would count in the evidence."""
    mask = np.asarray(observation.mask).ravel()
    if mask.all():
        return observation
    index = jnp.asarray(np.flatnonzero(mask))
    data = observation.data.ravel()[index]
    covariance = observation.cov_y()[index][:, index]
    noise = Moments.dense(jnp.zeros_like(data), covariance)
    return Unmasked(data=data, noise=noise, observation=observation, index=index)


class PriorEvent(NamedTuple):
    """Prior site `site` of a `problem` in the centred form, one event, and its law.

    `has_data` says whether the model has observed sites or factors.
    """

    problem: Any
    site: str
    prior: ScorePrior | Composition
    has_data: bool


def only_prior(problem: Any, engine: str) -> PriorEvent:
    """The one prior site of `problem`, of one event, whatever is observed.

    Raises `ValueError`, naming `engine` and site, for a model with others, with other latent sites,
    with a prior under a plate or behind further transforms.
    """
    sites = problem.sites
    if len(sites.priors) != 1 or sites.latents:
        raise ValueError(
            f"{engine} needs one prior site and no other latent site, got prior sites "
            f"{list(sites.priors)} and other latent sites {list(sites.latents)}: {ADVICE}"
        )
    (name,) = sites.priors
    problem = problem.centred(with_value=False)
    recorded = problem.trace(problem.initial(jax.random.key(0)))
    prior = _law(recorded, name, engine, True)
    _check_event(name, sites.priors[name].shape, prior)
    has_data = any(map(_is_data, recorded.values()))
    return PriorEvent(problem, name, prior, has_data)


def only_observation(problem: Any, engine: str, *, composed: bool = False) -> Observed:
    """The one prior site of `problem` and the one observed site.

    Raises `ValueError`, naming `engine` and site, for a model with others or with other latent
    sites, for a prior behind further transforms or, unless `composed`, one that is a composition,
    for data that are not Gaussian, for noise that depends on the event, and for a model with a
    `numpyro.factor`, which would be left out.
    """
    sites = problem.sites
    if len(sites.priors) != 1 or len(sites.observed) != 1 or sites.latents:
        raise ValueError(
            f"{engine} needs one prior site, one observed site and no other latent site, got "
            f"prior sites {list(sites.priors)}, observed sites {list(sites.observed)} and other "
            f"latent sites {list(sites.latents)}: {ADVICE}"
        )
    (name,), (observed,) = sites.priors, sites.observed
    problem = problem.centred(with_value=False)
    points = [problem.initial(jax.random.key(seed)) for seed in range(2)]
    recorded = problem.trace(points[0])
    prior = _law(recorded, name, engine, composed)
    factors = [n for n, s in recorded.items() if _is_data(s) and n != observed]
    if factors:
        raise ValueError(
            f"{engine} needs data at site {observed!r} and no other factor of the density, got "
            f"{factors}: {ADVICE}"
        )
    here, there = (problem.linearise(point) for point in points)
    if not _same_noise(here, there):
        raise ValueError(
            f"{engine} needs noise at observed site {observed!r} that does not depend on {name!r}, "
            f"got noise that does: {ADVICE}"
        )
    return Observed(problem, name, here.point.shape, prior, here)


def observed_event(problem: Any, engine: str, *, composed: bool = False) -> ObservedEvent:
    """As `only_observation`, where the prior site is one event; raises under a plate."""
    found = only_observation(problem, engine, composed=composed)
    _check_event(found.site, found.shape, found.prior)
    return ObservedEvent(found.problem, found.site, found.prior, _unmasked(found.observation))


def _is_data(site: Any) -> bool:
    """Whether a recorded site is observed, or a `numpyro.factor`."""
    return site["type"] == "sample" and site["is_observed"]


def _law(recorded: Any, name: str, engine: str, composed: bool) -> Any:
    prior, _ = peel(recorded[name]["fn"])
    if isinstance(prior, ScorePrior) or (composed and isinstance(prior, Composition)):
        return prior
    if isinstance(prior, Composition):
        raise ValueError(
            f"{engine} needs a ScorePrior at prior site {name!r}, got a Composition, whose scores "
            "at high noise are not known: take FeynmanKac with a method such as TMPD(), or an "
            "engine that is not centred"
        )
    raise ValueError(
        f"{engine} needs a ScorePrior at prior site {name!r}, got one behind further "
        f"transforms ({type(prior).__name__}): put them into the mean of the data; {ADVICE}"
    )


def _check_event(name: str, shape: tuple[int, ...], prior: Any) -> None:
    if shape != prior.event_shape:
        raise ValueError(
            f"prior site {name!r} must be one event of shape {prior.event_shape}, got shape "
            f"{shape}: NUTS and TemperedSMC take events under plates"
        )


def _same_noise(a: Observation, b: Observation) -> Any:
    first, second = a.cov_y(), b.cov_y()
    tolerance = jnp.sqrt(jnp.finfo(first.dtype).eps) * jnp.max(jnp.abs(first))
    return jnp.max(jnp.abs(first - second)) <= tolerance


__all__ = [
    "ADVICE",
    "Observed",
    "ObservedEvent",
    "PriorEvent",
    "observed_event",
    "only_observation",
    "only_prior",
]
