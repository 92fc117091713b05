"""Positions of a `Problem` as flat vectors on the scale of the prior."""

import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from scoreprior._typing import Key, Scalar
from scoreprior.density import AbstractDensity, FlowDensity
from scoreprior.prior import ProbabilityFlow
from scoreprior.problem import Position, Problem
from scoreprior.problem.sites import peel

NUM_PRIOR_DRAWS = 64
NUM_TRIED = 8
ONE_SIGMA = 0.8413447  # the normal distribution function at 1


class Frame(eqx.Module):
    """Coordinates `z` with `position = loc + scale * z`, flattened by site name.

    `loc` and `scale` are median and half the central 68 % of prior draws, and exactly 0 and 1 for
    noise `u`, so that one learning rate fits all.
    """

    loc: Float[Array, " size"]
    scale: Float[Array, " size"]
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)

    @classmethod
    def of(cls, problem: Problem, positions: Mapping[str, Array]) -> "Frame":
        """The frame of prior draws `positions` [draw, *site]."""
        shapes = tuple((name, positions[name].shape[1:]) for name in sorted(positions))
        flat = jax.vmap(lambda position: ravel_pytree(dict(position))[0])(positions)
        low, loc, high = jnp.quantile(flat, jnp.array([1 - ONE_SIGMA, 0.5, ONE_SIGMA]), axis=0)
        normal = [name in problem.sites.priors and not problem.is_centred for name, _ in shapes]
        sizes = [math.prod(shape) for _, shape in shapes]
        is_noise = jnp.asarray(np.repeat(normal, sizes))
        width = (high - low) / 2
        scale = jnp.where(is_noise | (width == 0), 1, width)
        return cls(jnp.where(is_noise, 0, loc), scale, shapes)

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def log_det(self) -> Scalar:
        """`log |d position / dz|`."""
        return jnp.sum(jnp.log(self.scale))

    def position(self, z: Float[Array, " size"]) -> dict[str, Array]:
        """The position at `z`."""
        template = {
            name: jax.ShapeDtypeStruct(shape, self.loc.dtype) for name, shape in self.shapes
        }
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)
        return ravel_pytree(zeros)[1](self.loc + self.scale * z)

    def z(self, position: Position) -> Float[Array, " size"]:
        """The coordinates of `position`; `ValueError` for the wrong sites or shapes."""
        found = {name: jnp.shape(value) for name, value in position.items()}
        if found != dict(self.shapes):
            raise ValueError(
                f"position must have sites and shapes {dict(self.shapes)}, got {found}"
            )
        ordered = {name: jnp.asarray(position[name], self.loc.dtype) for name, _ in self.shapes}
        return (ravel_pytree(ordered)[0] - self.loc) / self.scale


def start(problem: Problem, key: Key) -> tuple[Frame, Float[Array, " tried"]]:
    """The frame of `problem`, and its log density at a few prior draws (call it under `jit`)."""
    keys = jax.random.split(key, NUM_PRIOR_DRAWS)
    positions = jax.vmap(problem.initial)(keys)
    few = jax.tree.map(lambda leaf: leaf[:NUM_TRIED], positions)
    return Frame.of(problem, positions), jax.lax.map(problem.log_density, few)


def check_start(log_density: np.ndarray) -> None:
    """`ValueError` where the log density is NaN at a prior draw, or finite at none."""
    bad = np.isnan(log_density) | (log_density == np.inf)
    if bad.any():
        raise ValueError(
            f"the log density is NaN or plus infinity at {bad.sum()} of {bad.size} prior draws: "
            "check the data for NaN, and the model at extreme draws from its prior"
        )
    if not np.isfinite(log_density).any():
        raise ValueError(
            f"the log density is minus infinity at all {bad.size} prior draws tried: check that "
            "the data are possible under the prior, and the units of the noise"
        )


def form(problem: Problem, centred: bool) -> Problem:
    """`problem` in the form asked for, fit to be optimised.

    Raises `NotImplementedError` for the centred form of a prior without a density, and
    `ValueError` where the gradient of that density is a score.
    """
    if not (centred or problem.is_centred):
        return problem
    with_density = problem.centred()
    if names := _with_score_gradient(problem):
        raise ValueError(
            f"prior site {names[0]!r} has a FlowDensity with a ScoreGradient, which is not the "
            "gradient of its density, so an optimiser would go astray: use FlowDensity() or "
            "BoundDensity(num_times), or the non-centred form (centred=False)"
        )
    return with_density


def is_normalised(problem: Problem) -> bool:
    """Whether the joint density of `problem` is known with its constant."""
    if not problem.is_centred:
        return True
    return all(d.is_normalised for found in _densities(problem).values() for d in found)


def _with_score_gradient(problem: Problem) -> list[str]:
    return [
        name
        for name, densities in _densities(problem).items()
        if any(isinstance(d, FlowDensity) and d.gradient is not None for d in densities)
    ]


def _densities(problem: Problem) -> dict[str, list[AbstractDensity]]:
    """The density policies of every prior site."""
    found: dict[str, list[AbstractDensity]] = {}

    def look() -> None:
        sites = problem.trace(problem.constrain(problem.initial(jax.random.key(0))))
        for name in problem.sites.priors:
            flows: list[Any] = [
                transform
                for transform in peel(sites[name]["fn"])[0].transforms
                if isinstance(transform, ProbabilityFlow)
            ]
            found[name] = [flow.density for flow in flows]

    jax.eval_shape(look)
    return found


__all__ = ["Frame", "check_start", "form", "is_normalised", "start"]
