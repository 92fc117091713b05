"""Kernels at home where the prior is standard normal, as it is in the non-centred form.

They target `exp(f(w)) N(w; 0, I)` and leave the normal factor invariant by construction, so that
only `f` limits their moves. For a position `z` whose coordinates are all noise of prior sites, `f`
is the log likelihood. Other latent sites, such as the scale of the noise, have other priors.
They are treated exactly, with

    z = location + scale * w,    f(w) = log p(z, y) - log N(w; 0, I)

where `location` and `scale` are 0 and 1 for prior sites, and for the others the median and half the
central 68 % of prior draws: any values are right, and these make `f` flat where the likelihood is.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.elliptical_slice import EllipSliceState
from blackjax.mcmc.marginal_latent_gaussian import CovarianceSVD
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Int

from scoreprior._run import Draws
from scoreprior._typing import Key, PyTree, Scalar
from scoreprior._util import check_positive
from scoreprior.mcmc.chains import AbstractChains, warn_nan
from scoreprior.mcmc.gradient import refused_nan
from scoreprior.mcmc.warmup import Warmup, WarmupState
from scoreprior.problem import Problem

NUM_PRIOR_DRAWS = 1000
MAX_DELTA = 1e4  # the proposal is then within 1e-4 of its limit, prior draws shifted by grad f


class GaussianPriorState(NamedTuple):
    """Chains in the coordinates `w`, their tuning, and the map back to positions."""

    chains: Any  # leaves [chain, ...]
    warmup: WarmupState
    location: dict[str, Array]
    scale: dict[str, Array]


class AbstractGaussianPriorChains(AbstractChains):
    """Chains of a kernel for `exp(f(w)) N(w; 0, I)`; `start` and `move` take `f`.

    `step_size` is tuned for a mean acceptance rate of `target_accept`, unless that is `None`.
    """

    target_accept: eqx.AbstractVar[Any]  # a float, or None
    step_size: eqx.AbstractVar[float]
    num_warmup: int = eqx.field(static=True, default=500)
    num_samples: int = eqx.field(static=True, default=500)
    num_chains: int = eqx.field(static=True, default=4)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=100, kw_only=True)

    def __check_init__(self):
        check_positive("step_size", self.step_size)
        if self.target_accept is not None and not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must be between 0 and 1, got {self.target_accept}")
        if self.centred:
            self._refuse_centred()

    @abstractmethod
    def move(
        self, key: Key, chain: Any, log_factor: Callable[[Any], Scalar], step_size: Scalar
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        """One step of one chain: the next state, its acceptance rate, and statistics by name."""

    def first(self, problem: Problem, chains: Any, key: Key) -> GaussianPriorState:
        if problem.is_centred:
            self._refuse_centred()
        location, scale = standardisation(problem, key)
        chains = _standardise(self, problem, chains.position, location, scale)
        step_sizes = jnp.full_like(chains.logdensity, self.step_size)
        size = sum(leaf[0].size for leaf in jax.tree.leaves(chains.position))
        return GaussianPriorState(chains, self._warmup().init(size, step_sizes), location, scale)

    def step(
        self, problem: Problem, state: GaussianPriorState, key: Key, number: Int[Array, ""]
    ) -> tuple[GaussianPriorState, dict[str, Any]]:
        factor = log_factor(problem, state.location, state.scale)

        def one(key: Key, chain: Any, step_size: Scalar) -> Any:
            return self.move(key, chain, factor, step_size)

        keys = jax.random.split(key, self.num_chains)
        chains, acceptance, stats = jax.vmap(one)(keys, state.chains, state.warmup.step_size)
        flat = jax.vmap(lambda position: ravel_pytree(position)[0])(chains.position)
        with jax.ensure_compile_time_eval():
            schedule = jnp.asarray(self._warmup().schedule(self.num_samples))
        warmup = self._warmup().update(state.warmup, schedule[number], flat, acceptance)
        lp = chains.logdensity + jax.vmap(_log_normal)(chains.position)
        outputs = {
            "positions": _to_position(chains.position, state.location, state.scale),
            "stats": {"lp": lp, **stats},
        }
        return state._replace(chains=chains, warmup=warmup), outputs

    def warn(self, draws: Draws) -> None:
        warn_nan(draws)

    def _warmup(self) -> Warmup:
        return Warmup(self.num_warmup, self.target_accept, dense_mass=None)

    def _refuse_centred(self) -> None:
        raise ValueError(
            f"{type(self).__name__} needs the non-centred form, in which the prior is standard "
            "normal: got centred=True; use the default, or another engine such as NUTS"
        )


class EllipticalSlice(AbstractGaussianPriorChains):
    """Elliptical slice sampling (Murray, Adams & MacKay 2010, figure 2).

    It has no step size, takes no gradient and always moves. It suits weak likelihoods: on ellipses
    through prior draws, a likelihood that is much narrower than the prior leaves only small steps.
    The warm-up is merely dropped. A point where the density is NaN lies outside every slice; a draw
    on the way to which there was one is `diverging`, and a warning counts them.

    **Arguments:** `num_warmup`, `num_samples`: steps per chain; `num_chains`. `centred` must be
    `False`. `chunk_size`: steps between two updates of the progress bar and of the checkpoint; it
    does not change the draws. `init`: where chains start, at prior draws by default.
    """

    target_accept: ClassVar[Any] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    step_size: ClassVar[Any] = 1.0  # pyright: ignore[reportIncompatibleVariableOverride]

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.elliptical_slice.init(position, logdensity_fn)

    def move(
        self, key: Key, chain: Any, log_factor: Callable[[Any], Scalar], step_size: Scalar
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        chain, num_evaluations, diverging = _elliptical_slice(key, chain, log_factor)
        stats = {"n_steps": num_evaluations, "diverging": diverging}
        return chain, jnp.ones_like(step_size), stats

    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        return f"{outputs['stats']['n_steps'].mean():.1f} densities per draw"


class LatentGaussian(AbstractGaussianPriorChains):
    """The marginal gradient sampler of Titsias & Papaspiliopoulos (2018, section 3), by blackjax.

    A proposal takes a step along the gradient of `f` and one of the prior, at once and exactly, so
    that it stays a prior draw where the likelihood says nothing. One gradient per draw. Its step
    size `delta` is tuned in the warm-up; above 10^4 it makes no difference and is taken as that.

    **Arguments:** `target_accept`: mean acceptance rate, in (0, 1), 0.5 to 0.6 in the paper.
    `step_size`: the first `delta`; without a warm-up the only one. The others are those of
    `EllipticalSlice`.
    """

    target_accept: float = eqx.field(static=True, default=0.55, kw_only=True)
    step_size: float = eqx.field(static=True, default=1.0, kw_only=True)

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        return blackjax.mgrad_gaussian.init(position, logdensity_fn, _Identity())

    def move(
        self, key: Key, chain: Any, log_factor: Callable[[Any], Scalar], step_size: Scalar
    ) -> tuple[Any, Scalar, dict[str, Array]]:
        identity: Any = _Identity()
        kernel = blackjax.mgrad_gaussian.build_kernel(
            CovarianceSVD(identity, jnp.ones((), step_size.dtype), identity)
        )
        delta = jnp.minimum(step_size, MAX_DELTA)
        chain, info = kernel(key, chain, log_factor, delta)
        acceptance, diverging = refused_nan(info.acceptance_rate)
        stats = {"acceptance_rate": acceptance, "step_size": delta, "diverging": diverging}
        return chain, acceptance, stats

    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        stats = outputs["stats"]
        delta = np.median(stats["step_size"][-1])
        return f"delta {delta:.2g}, acceptance {stats['acceptance_rate'].mean():.2f}"


class Bracket(NamedTuple):
    """Angles between which the next point of an ellipse is drawn, and what was found so far."""

    lower: Scalar
    upper: Scalar
    chain: EllipSliceState  # the last point
    num_evaluations: Int[Array, ""]
    diverging: Bool[Array, ""]


def _elliptical_slice(
    key: Key, chain: EllipSliceState, log_factor: Callable[[Any], Scalar]
) -> tuple[EllipSliceState, Int[Array, ""], Bool[Array, ""]]:
    """One step: the next state, the values taken of `log_factor`, and whether one was NaN.

    blackjax's kernel would accept NaN, and has no way to report it.
    """
    key_level, key_noise, key_cut, key_angle = jax.random.split(key, 4)
    # Of 1 - u, so that the level is finite; a value equal to it is inside, so that rounding cannot
    # leave a chain at its mode without a point to go to.
    u = jax.random.uniform(key_level, dtype=chain.logdensity.dtype)
    level = chain.logdensity + jnp.log1p(-u)
    flat, unravel = ravel_pytree(chain.position)
    noise = jax.random.normal(key_noise, flat.shape, flat.dtype)

    def shrink(bracket: Bracket) -> Bracket:
        lower, upper, _, num_evaluations, diverging = bracket
        own = jax.random.fold_in(key_angle, num_evaluations)
        angle = jax.random.uniform(own, (), flat.dtype, lower, upper)
        position = unravel(jnp.cos(angle) * flat + jnp.sin(angle) * noise)
        value = log_factor(position)
        return Bracket(
            jnp.where(angle < 0, angle, lower),
            jnp.where(angle < 0, upper, angle),
            EllipSliceState(position, value),
            num_evaluations + 1,
            diverging | jnp.isnan(value),
        )

    # The first point is anywhere on the ellipse, and the first bracket all of it, cut there.
    cut = jax.random.uniform(key_cut, (), flat.dtype, 0, 2 * jnp.pi)
    at_cut = Bracket(cut, cut, chain, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    first = shrink(at_cut)._replace(lower=cut - 2 * jnp.pi)
    last = jax.lax.while_loop(lambda at: ~(at.chain.logdensity >= level), shrink, first)
    return last.chain, last.num_evaluations, last.diverging


class _Identity:
    """The matrix of singular vectors of `I`, without the matrix."""

    def __matmul__(self, other: Array) -> Array:
        return other


def log_factor(
    problem: Problem, location: PyTree[Array], scale: PyTree[Array]
) -> Callable[[Any], Scalar]:
    """`f(w) = log p(location + scale w, y) - log N(w; 0, I)`, up to a constant."""

    def factor(w: dict[str, Array]) -> Scalar:
        return problem.log_density(_to_position(w, location, scale)) - _log_normal(w)

    return factor


def standardisation(problem: Problem, key: Key) -> tuple[dict[str, Array], dict[str, Array]]:
    """Location and scale by site: 0 and 1, or robust ones of prior draws where it is no prior."""
    lower, location, upper = _quantiles(problem, key)
    scale = jax.tree.map(lambda a, b: jnp.where(b > a, (b - a) / 2, 1), lower, upper)
    for name in problem.sites.priors:
        location[name] = jnp.zeros_like(location[name])
        scale[name] = jnp.ones_like(scale[name])
    return location, scale


@eqx.filter_jit
def _quantiles(problem: Problem, key: Key) -> list[dict[str, Array]]:
    def draw(key: Key) -> dict[str, Array]:
        drawn = problem.initial(key)
        # Prior sites need no draws: without them, nothing of their flow is computed.
        flat = {name: jnp.zeros_like(drawn[name]) for name in problem.sites.priors}
        return {**drawn, **flat}

    drawn = jax.lax.map(draw, jax.random.split(key, NUM_PRIOR_DRAWS), batch_size=50)
    levels = (0.16, 0.5, 0.84)
    return [jax.tree.map(lambda leaf, q=q: jnp.quantile(leaf, q, axis=0), drawn) for q in levels]


@eqx.filter_jit
def _standardise(
    engine: AbstractGaussianPriorChains,
    problem: Problem,
    positions: dict[str, Array],
    location: dict[str, Array],
    scale: dict[str, Array],
) -> Any:
    w = jax.tree.map(lambda z, m, s: (z - m) / s, positions, location, scale)
    factor = log_factor(problem, location, scale)
    return jax.vmap(lambda position: engine.start(position, factor))(w)


def _to_position(w: PyTree[Array], location: PyTree[Array], scale: PyTree[Array]) -> Any:
    return jax.tree.map(lambda w, m, s: m + s * w, w, location, scale)


def _log_normal(w: PyTree[Array]) -> Scalar:
    """`log N(w; 0, I)`, up to a constant."""
    return -jnp.asarray(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))) / 2
