"""What a NumPyro model asks: its sites, found by running it once.

A *prior site* is a latent site whose distribution is a `ScorePrior`, one behind further transforms,
or a `Composition`, possibly inside `expand`, `to_event` or a plate. Models that no gradient-based
engine can treat are refused here, naming the site.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.handlers import seed, trace
from numpyro.primitives import Messenger

from scoreprior._util import is_traced
from scoreprior.composition import Composition
from scoreprior.prior import ProbabilityFlow


class Site(NamedTuple):
    """One site of a model.

    `shape` of its value, batch axes first, and the names of the `plates` behind the axes of that
    shape, `None` where there is none.
    """

    name: str
    shape: tuple[int, ...]
    plates: tuple[str | None, ...]


class Sites(NamedTuple):
    """The sites of a model by kind, each in the order of the model.

    `priors` are latent sites with a `ScorePrior`; `latents` are the other latent sites; `observed`
    are those with data; `deterministic` are computed. `data` are the values of observed sites and
    `params` those of `numpyro.param` sites, which stay as they are. `compositions` are the names of
    the prior sites with a `Composition`.
    """

    priors: dict[str, Site]
    latents: dict[str, Site]
    observed: dict[str, Site]
    deterministic: dict[str, Site]
    data: dict[str, Array]
    params: dict[str, Any]
    compositions: tuple[str, ...] = ()


def find_sites(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sites:
    """Run `model` once, on a draw from its prior, and sort its sites."""
    recorded = trace(_Refuse(seed(model, jax.random.key(0)))).get_trace(*args, **kwargs)
    sites = Sites({}, {}, {}, {}, {}, {})
    for name, message in recorded.items():
        match message["type"]:
            case "param" | "mutable":
                sites.params[name] = message["value"]
            case "deterministic":
                sites.deterministic[name] = _computed(message)
            case "sample" if not message["is_observed"]:
                kind = sites.priors if is_prior(message["fn"]) else sites.latents
                kind[name] = _site(message, message["fn"].event_dim)
            case "sample" if not message["infer"].get("is_auxiliary"):
                _check_observed(message)
                sites.data[name] = jnp.asarray(message["value"])
                sites.observed[name] = _site(message, message["fn"].event_dim)
    _check_priors(sites, recorded)
    composed = (n for n in sites.priors if isinstance(peel(recorded[n]["fn"])[0], Composition))
    return sites._replace(compositions=tuple(composed))


def peel(distribution: dist.Distribution) -> tuple[dist.Distribution, Any]:
    """The distribution under `expand`, `to_event` and `mask`, and the product of the masks.

    The mask broadcasts against a value of the site.
    """
    mask: Any = True
    while isinstance(
        distribution, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
    ):
        if isinstance(distribution, dist.MaskedDistribution):
            own = jnp.asarray(distribution._mask)
            mask = mask & own.reshape(own.shape + (1,) * distribution.event_dim)
        distribution = distribution.base_dist
    return distribution, mask


def is_prior(distribution: dist.Distribution) -> bool:
    """Whether `distribution` is a composition, or has a probability flow among its transforms."""
    base, _ = peel(distribution)
    return isinstance(base, Composition) or any(
        isinstance(t, ProbabilityFlow) for t in getattr(base, "transforms", ())
    )


class _Refuse(Messenger):
    """Raises at the sites of no use to a gradient-based engine, before they are drawn."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            size, subsample_size = msg["args"]
            raise ValueError(
                f"plate {msg['name']!r} draws a random subsample, {subsample_size} of {size}, "
                "which makes the density random: give it all the data, or use NumPyro's SVI"
            )
        if msg["type"] == "sample" and not msg["is_observed"]:
            _check_latent(msg["name"], msg["fn"], msg["scale"])
            base, _ = peel(msg["fn"])
            if isinstance(base, Composition) and msg["value"] is None:
                # Any value of the right shape will do here, and its own draws take a cloud.
                batch = msg["fn"].shape()[: len(msg["fn"].shape()) - base.event_dim]
                msg["value"] = base.reference.sample(jax.random.key(0), batch)


def _check_latent(name: str, distribution: dist.Distribution, scale: Any) -> None:
    base, mask = peel(distribution)
    kind = type(base).__name__
    if distribution.support is not None and distribution.support.is_discrete:
        raise ValueError(
            f"latent site {name!r} is discrete ({kind}), which has no gradient: sum it out of the "
            "model, for instance with numpyro.distributions.MixtureSameFamily, or use NumPyro's "
            "DiscreteHMCGibbs"
        )
    if isinstance(base, dist.ImproperUniform):
        raise ValueError(
            f"latent site {name!r} is improper ({kind}), so it has no prior draws to start from: "
            "give it a proper, possibly wide, distribution"
        )
    if is_traced(mask) or not np.all(mask):
        raise ValueError(
            f"latent site {name!r} is masked, which leaves it without a density (improper): mask "
            "observed sites only"
        )
    if is_prior(distribution) and not (scale is None or is_one(scale)):
        raise ValueError(
            f"prior site {name!r} is under numpyro.handlers.scale, got scale {scale}: a power of "
            "this density is not the density of its noise; scale the likelihood instead"
        )


def is_one(scale: Any) -> bool:
    """Whether `scale` is known to be 1 everywhere."""
    return not is_traced(scale) and bool(np.all(np.asarray(scale) == 1))


def _check_observed(message: dict[str, Any]) -> None:
    name, shape = message["name"], jnp.shape(message["value"])
    expected = message["fn"].shape()
    if not _broadcasts_one_way(shape, expected):
        raise ValueError(f"observed site {name!r} needs data of shape {expected}, got {shape}")
    missing = jnp.isnan(message["value"]) & peel(message["fn"])[1]
    if not is_traced(missing) and missing.any():
        raise ValueError(
            f"observed site {name!r} has NaN in {int(missing.sum())} of {missing.size} entries: "
            "mask missing data with numpyro.handlers.mask"
        )
    log_prob = message["fn"].log_prob(message["value"])
    if not is_traced(log_prob) and jnp.isnan(log_prob).any():
        raise ValueError(
            f"observed site {name!r} has a log density of NaN: check the parameters of its "
            f"{type(peel(message['fn'])[0]).__name__} at prior draws"
        )


def _broadcasts_one_way(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether one shape broadcasts to the other; (3, 1) and (3,) would score every pair."""
    try:
        return jnp.broadcast_shapes(shape, expected) in (shape, expected)
    except ValueError:
        return False


def _check_priors(sites: Sites, recorded: dict[str, Any]) -> None:
    if not sites.priors:
        found = ", ".join(
            f"{name} ({type(peel(recorded[name]['fn'])[0]).__name__})" for name in sites.latents
        )
        raise ValueError(
            "the model has no latent ScorePrior site, expected at least one "
            f"numpyro.sample(name, prior); its latent sites are: {found or 'none'}"
        )
    for name in sites.priors:
        if f"{name}_base" in recorded:
            raise ValueError(
                f"site {name + '_base'!r} has the name that the noise of prior site {name!r} "
                "takes: rename it"
            )


def _computed(message: dict[str, Any]) -> Site:
    """A deterministic site: its leading axes are those of the plates, if they have their sizes."""
    shape = jnp.shape(message["value"])
    depth = max((-frame.dim for frame in message["cond_indep_stack"]), default=0)
    site = _site(message, max(len(shape) - depth, 0))
    complete = all(frame.name in site.plates for frame in message["cond_indep_stack"])
    return site if complete else site._replace(plates=(None,) * len(shape))


def _site(message: dict[str, Any], event_dim: int) -> Site:
    shape: tuple[int, ...] = jnp.shape(message["value"])
    plates: list[str | None] = [None] * len(shape)
    for frame in message["cond_indep_stack"]:
        axis = len(shape) - event_dim + frame.dim
        if axis >= 0 and shape[axis] == frame.size:
            plates[axis] = frame.name
    return Site(message["name"], shape, tuple(plates))


__all__ = ["Site", "Sites", "find_sites", "is_one", "is_prior", "peel"]
