"""What samplers along noise levels ask of a model: one prior site, seen linearly in known noise."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from scoreprior._typing import Event, Scalar
from scoreprior.flow import Flow
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.problem.observed import ADVICE, only_observation


class LinearProblem(eqx.Module):
    """`y = A x + N(0, cov_y)` for flattened `x` [n] and `y` [m], with `x` of `site`.

    `x` has the shape `shape`, that of one event of `prior` or, under plates, of several.
    """

    problem: Problem
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
    problem, name, shape, prior, here = only_observation(problem, engine)
    if not here.is_linear(jax.random.key(2)):
        raise ValueError(
            f"{engine} needs a mean of observed site {here.site!r} that is affine in {name!r}, got "
            f"one that is not: {ADVICE}"
        )
    matrices = here.matrix(), here.y.ravel(), here.cov_y()
    return LinearProblem(problem, name, shape, prior, *matrices)


__all__ = ["LinearProblem", "linear_problem"]
