"""Markov kernels that move the particles of a cloud, with scales that the cloud gives them.

A kernel leaves `logdensity_fn` invariant for every `step_size` and whatever its scales. Coordinates
are those of the flattened position, `size` in all.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax import additive_step_random_walk, hmc
from blackjax.mcmc.metrics import LowRankInverseMassMatrix
from blackjax.mcmc.random_walk import normal
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count


class AbstractMoves(eqx.Module):
    """A Markov kernel for one particle, out of blackjax.

    States have the fields `position` and `logdensity`. The step size is tuned until the acceptance
    rate, averaged over the cloud, is `target_accept`.
    """

    target_accept: eqx.AbstractVar[float]

    @abstractmethod
    def init(self, position: Any, logdensity_fn: Callable[[Any], Scalar]) -> Any:
        """The state at `position`."""

    @abstractmethod
    def scales(self, states: Any) -> Any:
        """What the kernel learns from the cloud, from `states` [particle, ...] of equal weight."""

    @abstractmethod
    def step(
        self,
        key: Key,
        state: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        scales: Any,
    ) -> tuple[Any, Scalar]:
        """The next state, and the probability with which the proposal was accepted.

        That is NaN where the density of the proposal was, which blackjax refuses like minus
        infinity.
        """

    @abstractmethod
    def first_step_size(self, size: int) -> float:
        """A guess for a standard normal of `size` coordinates, whence tuning starts."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """Evaluations of the density, or of its gradient, per step."""


class HMCMoves(AbstractMoves):
    """Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011).

    The mass matrix is the second moment `E[g g']` of the gradients `g` of the log density over the
    cloud, shrunk towards its diagonal by `size / (n + size)`. It equals the mean curvature,
    `-E[Hessian]`, so it is the inverse covariance of a Gaussian and, where modes lie apart, their
    mean inverse covariance: the variances of the cloud would measure the distances between them.

    Every step of every particle draws its own step size, uniform within `jitter` (relative) of the
    tuned one, so that no trajectory closes on itself and particles in narrow places move too. With
    `num_leapfrog=1` this is the Metropolis-adjusted Langevin algorithm.

    Of `n` particles it has the rank `min(n, size)` beside its diagonal, and is kept as such: a step
    takes `O(n size)`, and a temperature one singular value decomposition of [n, size].

    **Arguments:** `num_leapfrog`, gradients per step; `target_accept`, `jitter` in (0, 1);
    `dense_mass`, or else the diagonal alone.
    """

    num_leapfrog: int = eqx.field(static=True, default=3)
    target_accept: float = eqx.field(static=True, default=0.8, kw_only=True)
    jitter: float = eqx.field(static=True, default=0.5, kw_only=True)
    dense_mass: bool = eqx.field(static=True, default=True, kw_only=True)

    def __check_init__(self):
        check_count("num_leapfrog", self.num_leapfrog)
        check_fraction("target_accept", self.target_accept)
        check_fraction("jitter", self.jitter)

    def init(self, position: Any, logdensity_fn: Callable[[Any], Scalar]) -> Any:
        return hmc.init(position, logdensity_fn)

    def scales(self, states: Any) -> LowRankInverseMassMatrix | Array:
        """The inverse mass matrix, of rank `min(n, size)` beside its diagonal, or that [size]."""
        gradients = flatten(states.logdensity_grad)
        finite = jnp.all(jnp.isfinite(gradients), 1)
        gradients = jnp.where(finite[:, None], gradients, 0)
        n, size = jnp.sum(finite), gradients.shape[1]
        variances = jnp.sum(gradients**2, 0) / n
        if not self.dense_mass:
            return 1 / variances
        shrinkage = size / (n + size)
        whitened = gradients / jnp.sqrt(n * variances)[None]
        _, singular, axes = jnp.linalg.svd(whitened, full_matrices=False)
        inverses = shrinkage / (shrinkage + (1 - shrinkage) * singular**2)
        return LowRankInverseMassMatrix((shrinkage * variances) ** -0.5, axes.T, inverses)

    def step(
        self,
        key: Key,
        state: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        scales: Any,
    ) -> tuple[Any, Scalar]:
        key_jitter, key = jax.random.split(key)
        within = jax.random.uniform(key_jitter, (), step_size.dtype, -self.jitter, self.jitter)
        step_size = step_size * (1 + within)
        kernel = hmc.build_kernel()
        state, info = kernel(key, state, logdensity_fn, step_size, scales, self.num_leapfrog)
        # Too long a trajectory overflows, which says nothing of the model.
        finite = jnp.all(jnp.isfinite(ravel_pytree(info.proposal.position)[0]))
        undefined = jnp.isnan(info.proposal.logdensity) & finite
        return state, jnp.where(undefined, jnp.nan, info.acceptance_rate)

    def first_step_size(self, size: int) -> float:
        return size**-0.25

    @property
    def cost(self) -> int:
        return self.num_leapfrog


class RandomWalkMoves(AbstractMoves):
    """Random-walk Metropolis with steps `N(0, step_size^2 diag(v))`, `v` the cloud's variances.

    It takes no gradient: for likelihoods without one, in few dimensions.

    **Arguments:** `target_accept` in (0, 1), by default that which is best in many dimensions
    (Roberts, Gelman & Gilks 1997).
    """

    target_accept: float = eqx.field(static=True, default=0.234, kw_only=True)

    def __check_init__(self):
        check_fraction("target_accept", self.target_accept)

    def init(self, position: Any, logdensity_fn: Callable[[Any], Scalar]) -> Any:
        return additive_step_random_walk.init(position, logdensity_fn)

    def scales(self, states: Any) -> Array:
        """Standard deviations [size]."""
        return jnp.std(flatten(states.position), 0)

    def step(
        self,
        key: Key,
        state: Any,
        logdensity_fn: Callable[[Any], Scalar],
        step_size: Scalar,
        scales: Any,
    ) -> tuple[Any, Scalar]:
        kernel, values = additive_step_random_walk.build_kernel(), []

        def watched(position: Any) -> Scalar:
            values.append(logdensity_fn(position))
            return values[-1]

        state, info = kernel(key, state, watched, normal(step_size * scales))
        (proposed,) = values
        return state, jnp.where(jnp.isnan(proposed), jnp.nan, info.acceptance_rate)

    def first_step_size(self, size: int) -> float:
        return 2.4 * size**-0.5

    @property
    def cost(self) -> int:
        return 1


def flatten(positions: Any) -> Float[Array, "n size"]:
    """The positions of a cloud, leaves [n, *site], as rows."""
    return jax.vmap(lambda one: ravel_pytree(one)[0])(positions)


def check_fraction(name: str, value: float) -> None:
    """Raise `ValueError` unless `0 < value < 1`."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
