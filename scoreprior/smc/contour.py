"""Slice moves of a live point of nested sampling, within a contour of the likelihood."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from scoreprior._slice import slice_line
from scoreprior._typing import Key, Scalar
from scoreprior.problem import Problem
from scoreprior.smc.moves import flatten

WIDTH = 2.0  # of the first bracket, in standard deviations of the live points
MAX_EXPANSIONS = 10


class LivePoint(NamedTuple):
    """A live point, under blackjax's names; the density is that of the prior."""

    position: Any
    logdensity: Scalar
    loglikelihood: Scalar
    loglikelihood_birth: Scalar  # the contour within which it was drawn, NaN for the prior
    ancestor: Int[Array, ""]  # the prior draw whence it comes, by copies and moves


def live_point(problem: Problem, position: Any, ancestor: Int[Array, ""]) -> LivePoint:
    """The point at `position`, as if drawn from the prior."""
    log_prior, log_likelihood = problem.log_prior(position), problem.log_likelihood(position)
    birth = jnp.full_like(log_likelihood, jnp.nan)
    return LivePoint(position, log_prior, log_likelihood, birth, ancestor)


def directions(key: Any, state: Any, info: Any, params: Any) -> dict[str, Array]:
    """What shapes the directions of the slices: a factor of the covariance of the live points.

    It is shrunk towards its diagonal by `size / (n + size)`, so that it is definite for any number
    of points.
    """
    points = flatten(state.particles.position)
    n, size = points.shape
    covariance = jnp.cov(points, rowvar=False, ddof=0).reshape(size, size)
    shrinkage = size / (n + size)
    covariance = (1 - shrinkage) * covariance + shrinkage * jnp.diag(jnp.diag(covariance))
    return {"covariance_factor": jnp.linalg.cholesky(covariance)}


def slice_move(
    problem: Problem, key: Key, point: LivePoint, contour: Scalar, covariance_factor: Array
) -> tuple[LivePoint, dict[str, Array]]:
    """One move that leaves the prior above the `contour` as it is, and statistics of it.

    Hit-and-run in coordinates whitened by `covariance_factor`. blackjax's own move takes a
    likelihood of NaN to be below the contour, and has no way to report it.
    """
    key_line, key_slice = jax.random.split(key)
    flat, unravel = ravel_pytree(point.position)
    noise = jax.random.normal(key_line, flat.shape, flat.dtype)
    direction = covariance_factor @ (noise / jnp.linalg.norm(noise))

    def at(t: Scalar) -> LivePoint:
        moved = live_point(problem, unravel(flat + t * direction), point.ancestor)
        inside = jnp.where(moved.loglikelihood > contour, moved.logdensity, -jnp.inf)
        value = jnp.where(jnp.isnan(moved.loglikelihood), jnp.nan, inside)
        return moved._replace(logdensity=value)

    width = jnp.asarray(WIDTH, point.logdensity.dtype)
    point, found, stats = slice_line(key_slice, point, at, width, MAX_EXPANSIONS)
    return point, {"found": found, **stats}
