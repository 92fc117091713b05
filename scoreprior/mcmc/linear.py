"""What samplers along noise levels ask of a model: one prior site, seen linearly in known noise."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event, Scalar
from scoreprior.flow import Flow
from scoreprior.prior import ScorePrior
from scoreprior.problem import Observation, Problem
from scoreprior.problem.sites import peel


class LinearProblem(eqx.Module):
    """`y = A x + N(0, cov_y)` for flattened `x` [n] and `y` [m], with `x` of `site`.

    `x` has the shape `shape`, that of one event of `prior` or, under plates, of several.
    """

    problem: Problem = eqx.field(static=True)
    site: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    prior: ScorePrior
    A: Float[Array, "m n"]
    y: Float[Array, " m"]
    cov_y: Float[Array, "m m"]

    @property
    def flow(self) -> Flow:
        return self.prior.flow

    def prior_score(self, x: Event, sigma: Scalar) -> Event:
        """`grad log p_sigma(x)` of the prior, by its denoiser, [*shape]."""
        return self.prior.score(x, sigma)


def linear_problem(problem: Problem, engine: str) -> LinearProblem:
    """`problem` as a `LinearProblem`; raises `ValueError`, naming `engine` and site, if none."""
    sites = problem.sites
    advice = "SGLD, SGHMC and SVGD take any model, as NUTS does in the non-centred form"
    if len(sites.priors) != 1 or len(sites.observed) != 1 or sites.latents:
        raise ValueError(
            f"{engine} needs one prior site, one observed site and no other latent site, got "
            f"prior sites {list(sites.priors)}, observed sites {list(sites.observed)} and other "
            f"latent sites {list(sites.latents)}: {advice}"
        )
    (name,), (observed,) = sites.priors, sites.observed
    problem = problem.centred(with_value=False)
    points = [problem.initial(jax.random.key(seed)) for seed in range(2)]
    prior, _ = peel(problem.trace(points[0])[name]["fn"])
    if not isinstance(prior, ScorePrior):
        raise ValueError(
            f"{engine} needs a ScorePrior at prior site {name!r}, got one behind further "
            f"transforms ({type(prior).__name__}): put them into the mean of the data; {advice}"
        )
    here, there = (problem.linearise(point) for point in points)
    if not here.is_linear(jax.random.key(2)):
        raise ValueError(
            f"{engine} needs a mean of observed site {observed!r} that is affine in {name!r}, got "
            f"one that is not: {advice}"
        )
    if not _same_noise(here, there):
        raise ValueError(
            f"{engine} needs noise at observed site {observed!r} that does not depend on {name!r}, "
            f"got noise that does: {advice}"
        )
    matrices = here.matrix(), here.y.ravel(), here.cov_y()
    return LinearProblem(problem, name, here.point.shape, prior, *matrices)


def _same_noise(a: Observation, b: Observation) -> Any:
    first, second = a.cov_y(), b.cov_y()
    tolerance = jnp.sqrt(jnp.finfo(first.dtype).eps) * jnp.max(jnp.abs(first))
    return jnp.max(jnp.abs(first - second)) <= tolerance


__all__ = ["LinearProblem", "linear_problem"]
