"""`SplitGibbs`: an event seen linearly, in a clean and a noisy half, and what else is unknown.

Written for an event `x` under the prior, a noisy copy `z = x + rho n`, and the other latent sites
`theta`. Given `z` the three parts of the model come apart: the data and `theta` see `z` alone, and
`x` is a denoising problem, whatever the prior, as far as the denoiser is that of a law.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from scoreprior._run import Draws
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.flow import Flow
from scoreprior.guide.linear import Linear
from scoreprior.mcmc.chains import AbstractChains
from scoreprior.mcmc.score import ScoreChain, all_finite, start_by_score
from scoreprior.mcmc.start import AbstractInit
from scoreprior.mcmc.warmup import Warmup
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.problem.observed import ADVICE
from scoreprior.problem.sites import peel
from scoreprior.sample import HalfNoise, solve

CLEAN_LEVEL = 0.1
"""The noise level of the clean half of an exact run, in units of `sigma_min`."""


class Levels(NamedTuple):
    """Noise level of the clean half, and `rho` at the first step and at the last."""

    clean: Scalar
    rho_max: Scalar
    rho_min: Scalar


class SplitState(NamedTuple):
    """The clean halves, the other latent sites, and the tuning of their kernel."""

    x: Float[Array, "chains *site"]
    theta: dict[str, Array]  # [chain, *site], unconstrained
    warmup: Any  # a `WarmupState`, or () where there is no theta


class SplitGibbs(AbstractChains):
    """Split Gibbs sampling with a diffusion prior (PnP-DM; Wu et al., NeurIPS 2024), of all sites.

    For data `y = A x + N(0, cov_y)`, of which `A`, offset and `cov_y` may depend on the other
    latent sites `theta`, a sweep draws in turn from the conditionals of

        pi(x, z, theta) ~ p(x) N(z; x, rho^2 I) p(y | z, theta) p(theta):

    `z` given `x` and `theta`, Gaussian and exact; `theta` given `z`, by `num_nuts_steps` steps of
    NUTS; `x` given `z`, by the reverse SDE from noise level `rho` down, in `num_steps` steps of
    `HalfNoise`. For an exact denoiser, of any prior, that is exact but for the error of the steps,
    of second order. In the warm-up `rho` falls, as `max(rho_min, rho_max decay^k)` in sweep `k`,
    and NUTS is tuned.

    A trained network is the denoiser of no law exactly: the prior is then the law that noise up to
    `rho` and the SDE down leave as it is, and not that of the flow, which `NUTS` has. The
    difference is measured in "One network, several laws" of the page
    [Imaging](../imaging.md#the-instrument-too).

    **What it targets.** Under `pi`, `z` and `theta` have *exactly* the posterior that they have if
    `N(0, rho^2 I)` is added to the prior. Two uses follow.

    - `rho_min=None`, the default: `z` is the `x` of the model, with its noise of `sigma_min`, and
      the clean half lies at a tenth of `sigma_min`. Draws are of the posterior, without smoothing;
      a network is called at levels below `sigma_min`, for which it should have been trained.
    - `rho_min=...`: the clean half is the `x` of the model, as in the paper, and draws are of the
      marginal of `pi` in `x` and `theta`. That is not the posterior, which it nears as `rho_min`
      falls: the data weigh as if they had been taken of `z`. For a Gaussian prior `N(m, C)`, with
      `K = C (C + rho^2 I)^-1` and `z` given `y` of mean `m_z` and covariance `P_z`, its mean is
      `m + K (m_z - m)` and its covariance `K P_z K' + rho^2 K`.

    The price of a small `rho` is a slow chain. Where data say nothing and the prior has variance
    `c`, successive draws have correlation `c / (c + rho^2)`: an autocorrelation time of
    `1 + 2 c / rho^2` sweeps. Chains hardly pass between modes that are further apart than `rho`.

    **Arguments:** `rho_min`, in data units, or `None`; `num_warmup`, `num_samples`: sweeps per
    chain; `num_chains`. `rho_max`: by default the largest standard deviation of the moments of the
    flow. `decay`, in (0, 1). `num_steps` of the reverse SDE, levels even in `log sigma`.
    `num_nuts_steps` per sweep, with `target_accept`, `max_tree_depth` and `dense_mass` as in
    `NUTS`; `step_size` is the first one. `chunk_size`: sweeps between two updates of the progress
    bar and of the checkpoint; it does not change the draws. `init`: where chains start.

    Raises `ValueError` for a model with several prior sites or observed sites, a mean of the data
    that is not affine in `x`, anything else that depends on `x` (noise, the law of another site, a
    `numpyro.factor`), a prior that depends on other sites; for a warm-up too short for `rho` to
    reach `rho_min`; and for levels that the denoiser does not have. A sweep factorises a matrix of
    the size of the data.
    """

    rho_min: float | None = eqx.field(static=True, default=None)
    num_warmup: int = eqx.field(static=True, default=200)
    num_samples: int = eqx.field(static=True, default=500)
    num_chains: int = eqx.field(static=True, default=4)
    rho_max: float | None = eqx.field(static=True, default=None, kw_only=True)
    decay: float = eqx.field(static=True, default=0.9, kw_only=True)
    num_steps: int = eqx.field(static=True, default=20, kw_only=True)
    num_nuts_steps: int = eqx.field(static=True, default=3, kw_only=True)
    target_accept: float = eqx.field(static=True, default=0.8, kw_only=True)
    max_tree_depth: int = eqx.field(static=True, default=10, kw_only=True)
    dense_mass: bool = eqx.field(static=True, default=False, kw_only=True)
    step_size: float = eqx.field(static=True, default=1.0, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=25, kw_only=True)
    centred: ClassVar[Any] = True  # pyright: ignore[reportIncompatibleVariableOverride]

    def __check_init__(self):
        for name in ("rho_min", "rho_max"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.rho_min is not None and self.rho_max is not None and self.rho_max < self.rho_min:
            raise ValueError(
                f"rho_max must be at least rho_min = {self.rho_min}, got {self.rho_max}"
            )
        for name in ("decay", "target_accept"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("num_steps", "num_nuts_steps", "max_tree_depth"):
            check_count(name, getattr(self, name))
        check_positive("step_size", self.step_size)

    def form(self, problem: Problem) -> Problem:
        problem, flow = _checked(problem)
        self._check_levels(flow)
        return problem

    def begin(self, problem: Problem, key: Key, init: AbstractInit) -> ScoreChain:
        return ScoreChain(start_by_score(problem, None, key, self.num_chains, init))

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> ScoreChain:
        return ScoreChain(position)

    def first(self, problem: Problem, chains: Any, key: Key) -> SplitState:
        theta = dict(chains.position)
        x = theta.pop(_only_prior(problem))
        if not theta:
            return SplitState(x, theta, ())
        size = sum(leaf[0].size for leaf in theta.values())
        step_sizes = jnp.full(self.num_chains, self.step_size, x.dtype)
        return SplitState(x, theta, self._warmup().init(size, step_sizes))

    def step(
        self, problem: Problem, state: SplitState, key: Key, number: Int[Array, ""]
    ) -> tuple[SplitState, dict[str, Any]]:
        name = _only_prior(problem)
        prior = _prior(problem, jax.tree.map(lambda leaf: leaf[0], {name: state.x, **state.theta}))
        levels = self._levels(prior.flow)
        rho = jnp.maximum(levels.rho_min, levels.rho_max * self.decay**number)
        rho = rho.astype(state.x.dtype)
        keys = jax.random.split(key, (3, self.num_chains))
        values = {name: state.x, **state.theta}
        z = jax.vmap(lambda key, at: _noisy_half(problem, name, at, rho, key))(keys[0], values)
        theta, warmup, stats = self._move_nuisances(problem, state, z, keys[1], number)
        x = jax.vmap(lambda key, z: self._clean_half(prior, z, levels.clean, rho, key))(keys[2], z)
        positions = {name: z if self.rho_min is None else x, **theta}
        log_likelihood = jax.vmap(problem.log_likelihood)(positions)
        diverging = stats.get("diverging", False) | ~all_finite((x, positions))
        rhos = jnp.full(self.num_chains, rho)
        stats = {**stats, "diverging": diverging, "log_likelihood": log_likelihood, "rho": rhos}
        return SplitState(x, theta, warmup), {"positions": positions, "stats": stats}

    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        stats = outputs["stats"]
        said = f"rho {stats['rho'][-1, 0]:.3g}"
        if "step_size" in stats:
            said += f", step {np.median(stats['step_size'][-1]):.2g}"
        return f"{said}, {int(stats['diverging'].sum())} divergences"

    def warn(self, draws: Draws) -> None:
        diverging = draws.stats["diverging"]
        if count := int(diverging.sum()):
            warnings.warn(
                f"{count} of {diverging.size} sweeps diverged or are not finite: look for a badly "
                f"scaled nuisance parameter, raise target_accept above {self.target_accept}, or "
                f"num_steps above {self.num_steps}",
                stacklevel=3,
            )

    def _clean_half(
        self, prior: ScorePrior, z: Array, clean: Scalar, rho: Scalar, key: Key
    ) -> Array:
        """`x` at noise level `clean` given `z`, every event of the site by itself.

        In the level of all the noise there is, that of `z` being `sqrt(clean^2 + rho^2)`: the
        step of `HalfNoise` is the same as in the level of the noise on top of `x`.
        """
        top = jnp.sqrt(clean**2 + rho**2)
        even = jnp.linspace(jnp.log(top), jnp.log(clean), self.num_steps + 1)
        sigmas = jnp.exp(even).at[-1].set(clean)
        events = z.reshape(-1, *prior.event_shape)

        def one(key: Key, z: Array) -> Array:
            return solve(prior.flow.denoiser, z, key=key, sigmas=sigmas, sampler=HalfNoise())

        return jax.vmap(one)(jax.random.split(key, len(events)), events).reshape(z.shape)

    def _move_nuisances(
        self, problem: Problem, state: SplitState, z: Array, keys: Array, number: Int[Array, ""]
    ) -> tuple[dict[str, Array], Any, dict[str, Array]]:
        """`theta` given `z` in all chains, the tuning, and statistics by name."""
        if not state.theta:
            return state.theta, (), {}
        name, kernel = _only_prior(problem), blackjax.nuts.build_kernel()
        mass = state.warmup.inverse_mass_matrix

        def one(key: Key, z: Array, theta: dict[str, Array], step_size: Scalar) -> Any:
            def log_density(theta: dict[str, Array]) -> Scalar:
                return problem.log_conditional({name: z, **theta})

            def move(chain: Any, key: Key) -> Any:
                return kernel(
                    key, chain, log_density, step_size, mass, max_num_doublings=self.max_tree_depth
                )

            start = blackjax.nuts.init(theta, log_density)
            end, infos = jax.lax.scan(move, start, jax.random.split(key, self.num_nuts_steps))
            return end.position, {
                "acceptance_rate": infos.acceptance_rate.mean(),
                "diverging": infos.is_divergent.any(),
                "n_steps": infos.num_integration_steps.sum(),
                "step_size": step_size,
            }

        theta, stats = jax.vmap(one)(keys, z, state.theta, state.warmup.step_size)
        flat = jax.vmap(lambda theta: ravel_pytree(theta)[0])(theta)
        with jax.ensure_compile_time_eval():
            schedule = jnp.asarray(self._warmup().schedule(self.num_samples))
        warmup = self._warmup().update(
            state.warmup, schedule[number], flat, stats["acceptance_rate"]
        )
        return theta, warmup, stats

    def _levels(self, flow: Flow) -> Levels:
        clean, rho_min = jnp.asarray(flow.sigma_min), self.rho_min
        if rho_min is None:
            low, _ = getattr(flow.denoiser, "level_range", (0.0, math.inf))
            clean = jnp.maximum(low, CLEAN_LEVEL * flow.sigma_min)
            rho_min = jnp.sqrt(flow.sigma_min**2 - clean**2)
        rho_max = self.rho_max or jnp.sqrt(flow.moments.eigenvalues.max())
        return Levels(clean, jnp.maximum(rho_max, rho_min), jnp.asarray(rho_min))

    def _check_levels(self, flow: Flow) -> None:
        clean, rho_max, rho_min = map(float, self._levels(flow))
        if not clean < 0.9 * flow.sigma_min and self.rho_min is None:
            raise ValueError(
                f"rho_min must be given for a denoiser that is defined from noise level {clean:g} "
                f"up, with sigma_min = {flow.sigma_min:g}: without it the clean half has no level "
                "of its own, got None"
            )
        if math.hypot(clean, rho_max) > flow.sigma_max:
            raise ValueError(
                f"rho_max must lie below sigma_max of the flow, {flow.sigma_max:g}, got {rho_max:g}"
            )
        needed = math.ceil(math.log(rho_min / rho_max) / math.log(self.decay))
        if self.num_warmup < needed:
            raise ValueError(
                f"num_warmup must be at least {needed}, for rho to fall from {rho_max:g} to "
                f"{rho_min:g} at decay = {self.decay}, got {self.num_warmup}"
            )

    def _warmup(self) -> Warmup:
        return Warmup(self.num_warmup, self.target_accept, self.dense_mass)


def _noisy_half(
    problem: Problem, name: str, position: dict[str, Array], rho: Scalar, key: Key
) -> Array:
    """`z` given `x` and `theta`, by Matheron's rule: `x + rho n` conditioned on the data."""
    key_draw, key_noise = jax.random.split(key)
    seen = problem.linearise(problem.constrain(position))
    x, A, S = position[name], seen.matrix(), seen.cov_y()
    draw = x + rho * jax.random.normal(key_draw, x.shape, x.dtype)
    linear = Linear(A @ x.ravel(), A, rho**2 * A)
    return linear.condition(key_noise, x, draw, seen.y.ravel(), S)[0]


def _only_prior(problem: Problem) -> str:
    return next(iter(problem.sites.priors))


def _prior(problem: Problem, position: dict[str, Array]) -> Any:
    """The distribution at the prior site, as bare as it gets."""
    return peel(problem.trace(problem.constrain(position))[_only_prior(problem)]["fn"])[0]


def _checked(problem: Problem) -> tuple[Problem, Flow]:
    """The centred form of a `problem` that `SplitGibbs` can treat, and its flow; or raises."""
    sites = problem.sites
    if len(sites.priors) != 1 or len(sites.observed) != 1:
        raise ValueError(
            "SplitGibbs needs one prior site and one observed site, got prior sites "
            f"{list(sites.priors)} and observed sites {list(sites.observed)}: {ADVICE}"
        )
    name, observed = _only_prior(problem), next(iter(sites.observed))
    problem = problem.centred(with_value=False)
    here, there = (problem.initial(jax.random.key(seed)) for seed in range(2))
    prior, other = _prior(problem, here), _prior(problem, there)
    if not isinstance(prior, ScorePrior):
        raise ValueError(
            f"SplitGibbs needs a ScorePrior at prior site {name!r}, got one behind further "
            f"transforms ({type(prior).__name__}): put them into the mean of the data; {ADVICE}"
        )
    if not eqx.tree_equal(prior.flow, other.flow):
        raise ValueError(
            f"SplitGibbs needs a prior at site {name!r} that does not depend on other sites, got "
            f"one that does: {ADVICE}"
        )
    seen = problem.linearise(problem.constrain(here))
    if not seen.is_linear(jax.random.key(2)):
        raise ValueError(
            f"SplitGibbs needs a mean of observed site {observed!r} that is affine in {name!r}, "
            f"got one that is not: {ADVICE}"
        )
    A, y, S = seen.matrix(), seen.y.ravel(), seen.cov_y()

    def rest(x: Array) -> tuple[Scalar, Scalar]:
        residual = y - A @ x.ravel()
        gaussian = -residual @ jnp.linalg.solve(S, residual) / 2
        return problem.log_conditional({**here, name: x}) - gaussian, gaussian

    (first, scale), (second, other_scale) = rest(here[name]), rest(there[name])
    tolerance = jnp.sqrt(jnp.finfo(y.dtype).eps) * (
        1 + abs(first) + jnp.maximum(abs(scale), abs(other_scale))
    )
    if not abs(first - second) <= tolerance:
        raise ValueError(
            f"SplitGibbs needs a model in which {name!r} has a part in the mean of {observed!r} "
            "alone, got one where it enters elsewhere (the noise, another site or a "
            f"numpyro.factor): {ADVICE}"
        )
    return problem, prior.flow


__all__ = ["SplitGibbs"]
