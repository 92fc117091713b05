"""Posteriors that go over to the prior where training has shown nothing."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Sigma
from scoreprior.denoise import AbstractDenoiser, Gaussian
from scoreprior.denoise.base import AbstractWrapper
from scoreprior.denoise.exact import AbstractExact
from scoreprior.flow import Flow
from scoreprior.prior import ScorePrior


class Confined(AbstractWrapper):
    """`denoiser` where the noised prior puts `z`, and the prior's own denoiser `law` far beyond.

    There training has shown nothing, so that an observation is to say nothing. The tails matter
    where many posteriors are put together, and only there: those of a regression under a network
    are Gaussian, and a product of them over powers of a prior that ends at an edge has no
    normaliser. Far beyond a normal prior they are the lighter ones, and are left alone.

    With the energy `E = -log p_sigma` of the prior, `rho^2 = 2 E(z) - 2 E(center)`, for a normal
    prior the distance in standard deviations. `denoiser` holds up to `rho = sqrt(size) + 3`, beyond
    which the prior has less than one draw in ten thousand, and `law` from `sqrt(size) + 4` on.
    """

    denoiser: Any
    law: AbstractDenoiser
    center: Float[Array, " size"]

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        root = math.sqrt(x.size)
        near, far = (root + 3) ** 2, (root + 4) ** 2
        depth = 2 * (self.law.energy(x, sigma) - self.law.energy(self.center, sigma))
        share = jnp.clip((far - depth) / (far - near), 0.0, 1.0)
        alone = self.law(x, sigma)
        return alone + share**2 * (3 - 2 * share) * (self.denoiser(x, sigma, context) - alone)


def confine(posteriors: list[ScorePrior], prior: Any) -> list[ScorePrior]:
    """The same, learned ones `Confined` to a `prior` that is known and not normal."""
    if not isinstance(prior, AbstractExact) or isinstance(_inner(prior), Gaussian):
        return posteriors
    center = prior.moments().mean

    def one(posterior: ScorePrior) -> ScorePrior:
        flow = posterior.flow
        if isinstance(_inner(flow.denoiser), AbstractExact):
            return posterior
        levels = {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
        denoiser = Confined(flow.denoiser, prior, center)
        return ScorePrior(
            Flow(denoiser, flow.moments, solver=flow.solver, **levels), posterior.density
        )

    return [one(posterior) for posterior in posteriors]


def _inner(denoiser: Any) -> Any:
    return getattr(denoiser, "denoiser", denoiser)


__all__ = ["Confined", "confine"]
