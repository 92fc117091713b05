"""Natural gradients of the ELBO of a normal guide, with the curvature of Gauss and Newton."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.problem import Problem
from scoreprior.vi.frame import Frame
from scoreprior.vi.guides import FullRank
from scoreprior.vi.optimise import FitState

LARGEST_RATE = 0.99
"""Short of one, at which directions that nothing curves would have no precision at all."""
MOST_TRIED = 8
"""Rates that a step tries, each half of the one before."""


class NaturalGradient(eqx.Module):
    """Steps of `VI(FullRank())` along the natural gradient, for the non-centred form.

    Of a guide `N(m, S)`, with means over its draws `z`, `G` the curvature of the log density and
    `rho` the rate,

        S'^-1 = (1 - rho) S^-1 + rho mean G(z)
        m'    = m + rho S' mean gradient log p(z)

    (Khan & Rue, J. Mach. Learn. Res. 24, 2023, equations 10 and 11). `G` is that of Gauss and
    Newton: the identity, for the noise of the priors, and `J' H J`, with `J` the Jacobian of the
    flow and `H` the curvature of the data and of the other latent sites given `x`, without its
    negative part. It leaves out the second derivative of the flow, so it is a covariance always,
    needs first derivatives of the network only, and is exact for a Gaussian posterior (Knollmueller
    & Ensslin 2019, "Metric Gaussian variational inference", make the same choice). The mean of the
    guide ends where the ELBO is largest for its covariance, which is that of the mean of `G`.

    A step after which the ELBO of the same draws is lower by more than its standard error is
    halved, up to seven times, and else left out. Tens of steps, where Adam takes hundreds, and no
    learning rate to choose. A step costs its gradients and `num_curvatures` Jacobians, each as much
    as `size` derivatives along one direction: for up to some hundred coordinates.

    **Arguments:** `num_curvatures`: draws at which `G` is taken, at most those of the bound.
    `decay`: the rate of step `t`, from 0, is `1 / (1 + t / decay)`.
    """

    num_curvatures: int = eqx.field(static=True, default=1)
    decay: float = eqx.field(static=True, default=3.0)

    def __check_init__(self):
        check_count("num_curvatures", self.num_curvatures)
        check_positive("decay", self.decay)

    def init(self, params: dict[str, Array]) -> Int[Array, ""]:
        """The number of steps taken."""
        del params
        return jnp.zeros((), jnp.int32)

    def step(
        self, problem: Problem, frame: Frame, num_particles: int, state: FitState, key: Key
    ) -> tuple[FitState, Scalar, Bool[Array, ""]]:
        """One step of the parameters of `FullRank`: also the ELBO before it, and if it is finite.

        Draws come in pairs, mirror images of each other.
        """
        normal = _Normal.of(state.params)
        size = len(normal.loc)
        half = jax.random.normal(key, (num_particles // 2, size), normal.loc.dtype)
        noise = jnp.concatenate([half, -half])

        def log_density(normal: _Normal, e: Array) -> Scalar:
            z = normal.loc + normal.root @ e
            return problem.log_density(frame.position(z)) + frame.log_det

        def log_weights(normal: _Normal, log_densities: Float[Array, " n"]) -> Float[Array, " n"]:
            log_guide = -0.5 * jnp.sum(noise**2 + jnp.log(2 * jnp.pi), 1)
            return log_densities - log_guide + jnp.sum(jnp.log(jnp.diagonal(normal.root)))

        found, gradients = jax.vmap(jax.value_and_grad(lambda e: log_density(normal, e)))(noise)
        found, slope = log_weights(normal, found), jnp.mean(gradients, 0)
        before, least = jnp.mean(found), jnp.mean(found) - jnp.std(found) / len(found) ** 0.5
        some = noise[: self.num_curvatures]
        curvatures = jax.lax.map(lambda e: _curvature(problem, frame, normal, e), some)
        curvature = jnp.mean(curvatures, 0)
        finite = [jnp.isfinite(leaf).all() for leaf in (before, slope, curvature)]
        is_finite = jnp.stack(finite).all()

        def tried(carry: tuple[Array, Array, _Normal, Array]) -> tuple[Any, ...]:
            count, rate, _, _ = carry
            new = normal.moved((1 - rate) * jnp.eye(size) + rate * curvature, rate * slope)
            after = log_weights(new, jax.vmap(lambda e: log_density(new, e))(noise))
            return count + 1, rate / 2, new, jnp.mean(after)

        def is_worse(carry: tuple[Array, Array, _Normal, Array]) -> Bool[Array, ""]:
            return is_finite & (carry[0] < MOST_TRIED) & ~(carry[3] >= least)

        rate = jnp.minimum(LARGEST_RATE, 1 / (1 + state.optimizer / self.decay))
        first = jnp.zeros((), jnp.int32), rate, normal, jnp.full_like(before, -jnp.inf)
        *_, new, after = jax.lax.while_loop(is_worse, tried, first)
        moved = FitState(new.params(), state.optimizer + 1)
        stays = FitState(state.params, state.optimizer + 1)
        is_better = after >= least
        state = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), moved, stays)
        return state, before, is_finite


def check_natural(problem: Problem) -> None:
    """`ValueError` for a problem without the identity that the curvature starts from."""
    if problem.is_centred:
        raise ValueError("problem must be in the non-centred form for a NaturalGradient")
    if problem.sites.compositions:
        raise ValueError(
            f"prior site {problem.sites.compositions[0]!r} is a Composition, whose noise is not "
            "standard normal, as a NaturalGradient needs: take an optax optimizer"
        )


class _Normal(NamedTuple):
    """`N(loc, root root')` with `root` lower triangular."""

    loc: Float[Array, " size"]
    root: Float[Array, "size size"]

    @classmethod
    def of(cls, params: dict[str, Array]) -> "_Normal":
        return cls(params["loc"], FullRank().distribution(params).scale_tril)

    def moved(
        self, precision: Float[Array, "size size"], slope: Float[Array, " size"]
    ) -> "_Normal":
        """With `precision` and a step of Newton along `slope`, both in units of this one."""
        factor = jnp.linalg.cholesky(precision)
        step = jax.scipy.linalg.cho_solve((factor, True), slope)
        inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(len(slope), dtype=slope.dtype))
        return _Normal(self.loc + self.root @ step, self.root @ jnp.linalg.cholesky(inverse))

    def params(self) -> dict[str, Array]:
        """As parameters of `FullRank`."""
        scale = jnp.diagonal(self.root)
        unit = self.root / scale[:, None]
        lower = unit[jnp.tril_indices(len(scale), -1)] * jnp.sqrt(len(scale))
        return {"loc": self.loc, "log_scale": jnp.log(scale), "lower": lower}


def _curvature(
    problem: Problem, frame: Frame, normal: _Normal, e: Float[Array, " size"]
) -> Float[Array, "size size"]:
    """`G` at draw `e` of the guide, in its units."""
    centred = problem.centred(with_value=False)

    def position(e: Array) -> dict[str, Array]:
        return frame.position(normal.loc + normal.root @ e)

    def noise(e: Array) -> Array:
        return ravel_pytree({name: position(e)[name] for name in problem.sites.priors})[0]

    def given(e: Array) -> dict[str, Array]:
        """What data and other sites depend on: `x` of the priors, the others as they are."""
        return centred.unconstrain(problem.constrain(position(e)))

    flat, unravel = ravel_pytree(given(e))
    hessian = jax.hessian(lambda flat: centred.log_conditional(unravel(flat)))(flat)
    curvature, axes = jnp.linalg.eigh(-hessian)
    jacobian = axes.T @ jax.jacfwd(lambda e: ravel_pytree(given(e))[0])(e)
    weighted = jnp.sqrt(jnp.maximum(curvature, 0))[:, None] * jacobian
    identity = jax.jacfwd(noise)(e)
    return weighted.T @ weighted + identity.T @ identity


__all__ = ["NaturalGradient", "check_natural"]
