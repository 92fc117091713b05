"""Density policies: what `log_prob` means, and what its gradient is.

A policy is a module with `log_prob(flow, x)` for one event. The trained score of a network is *not*
the gradient of its flow density; a policy says which of the two a gradient-based kernel sees.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior._util import check_count, check_positive
from scoreprior.denoise.base import energy_of
from scoreprior.flow import Flow


class AbstractTrace(eqx.Module):
    """Estimates of the trace of a Jacobian."""

    @abstractmethod
    def __call__(self, function: Callable[[Event], Event], x: Event) -> Float[Array, " n"]:
        """`n` estimates of `tr d(function)/dx` at `x`; their mean is the estimate."""


class Exact(AbstractTrace):
    """The trace itself, by one forward-mode product per entry of the event.

    `batch_size` products run side by side, all of them when `None`: lower it to save memory on
    large events.
    """

    batch_size: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def __call__(self, function: Callable[[Event], Event], x: Event) -> Float[Array, " n"]:
        _, push = jax.linearize(function, x)
        directions = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)

        def diagonal(direction):
            return jnp.vdot(direction, push(direction))

        if self.batch_size is None:
            entries = jax.vmap(diagonal)(directions)
        else:
            entries = jax.lax.map(diagonal, directions, batch_size=self.batch_size)
        return jnp.sum(entries)[None]


class Hutchinson(AbstractTrace):
    """Rademacher probes `v' J v` (Hutchinson 1989), the same ones at every point and step.

    The flow hands over the non-Gaussian residual only, so the Gaussian part of the trace carries no
    noise. `seed` fixes the probes: the estimate is one deterministic function of the point,
    unbiased for `log p` but not for `p`.
    """

    num_probes: int = eqx.field(static=True)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        check_count("num_probes", self.num_probes)
        check_count("seed", self.seed, least=0)

    def __call__(self, function: Callable[[Event], Event], x: Event) -> Float[Array, " n"]:
        _, push = jax.linearize(function, x)
        key = jax.random.key(self.seed)
        probes = jax.random.rademacher(key, (self.num_probes, *x.shape), x.dtype)
        return jax.vmap(lambda v: jnp.vdot(v, push(v)))(probes)


class AbstractDensity(eqx.Module):
    """A definition of `log p(x)` for the data side of a flow."""

    is_normalised: ClassVar[bool] = True
    """Whether the value counts, and not only its differences."""

    @abstractmethod
    def log_prob(self, flow: Flow, x: Event) -> Scalar:
        """`log p(x)` in nats, for one event in data units."""


class ScoreGradient(eqx.Module):
    """Use the score at noise level `sigma`, in data units, as the gradient of a log density.

    Lawful in Metropolis-corrected kernels only: a leapfrog step along any deterministic field is
    reversible and volume preserving, and acceptance uses the value. Not for variational inference
    or optimisation. `None` takes 1.25 times the `sigma_min` of the flow, where the score of the
    bundled digits prior is closest to the gradient of its density (flat between 1 and 1.5 times);
    `ScorePrior.check_consistency` finds it for another network.
    """

    sigma: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.sigma is not None:
            check_positive("sigma", self.sigma)

    def level(self, flow: Flow) -> float:
        """The noise level at which the score of `flow` is read."""
        return 1.25 * flow.sigma_min if self.sigma is None else self.sigma


class FlowDensity(AbstractDensity):
    """`log p` by the probability flow (Song et al. 2021, eq. 39; here whitened, see `flow`).

    **Arguments:** `trace`, `Exact()` or `Hutchinson(...)`; `gradient`, `None` to differentiate
    through the solver, consistently with the value, or a `ScoreGradient`, which costs one
    evaluation. Parameters of the denoiser are always differentiated through the solver.
    """

    trace: AbstractTrace = Exact()
    gradient: ScoreGradient | None = None

    def log_prob(self, flow: Flow, x: Event) -> Scalar:
        value = lambda flow, x: jnp.mean(self.estimates(flow, x))  # noqa: E731
        if self.gradient is None:
            return value(flow, x)
        return with_score(flow, x, value=value, sigma=self.gradient.level(flow))

    def estimates(self, flow: Flow, x: Event) -> Float[Array, " n"]:
        """Estimates of `log p(x)`, one per probe; one in all when the trace is exact."""
        u, log_det = flow.to_noise_and_log_det(x, self.trace)
        return jnp.sum(jax.scipy.stats.norm.logpdf(u)) + log_det

    def standard_error(self, flow: Flow, x: Event) -> Scalar:
        """Standard error of `log_prob` over probes, in nats.

        Zero when the trace is exact, infinite for a single probe.
        """
        estimates = self.estimates(flow, x)
        if isinstance(self.trace, Exact):
            return jnp.zeros_like(estimates[0])
        if len(estimates) == 1:
            return jnp.full_like(estimates[0], jnp.inf)
        return jnp.std(estimates, ddof=1) / jnp.sqrt(len(estimates))


class BoundDensity(AbstractDensity):
    """A lower bound on `log p` from denoising errors, with common random numbers.

    With the score `s` of the denoiser, the score `s_G` of its Gaussian moments, and
    `x_r = x + r n`, `sigma^2 = sigma_min^2 + r^2`,

        log p(x) >= log N(x; m, C + sigma_min^2 I)
                    + int E[ |n + r s_G(x_r, sigma)|^2 - |n + r s(x_r, sigma)|^2 ] dr / r,

    with `r` from `sigma_min / 100` (the integrand vanishes like `r^2`) to `sigma_max`; equality
    holds for the exact score (Song, Durkan, Murray & Ermon 2021, theorem 3, as used by Feng &
    Bouman 2024). The Gaussian reference makes the terminal term analytic and cancels most of the
    variance. Times are stratified in `log r`, noises come in antithetic pairs, both fixed by
    `seed`, so this is one deterministic, differentiable function of the point.

    **Arguments:** `num_times`, even: evaluations of the denoiser per call.
    """

    num_times: int = eqx.field(static=True)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        check_count("num_times", self.num_times, least=2)
        check_count("seed", self.seed, least=0)
        if self.num_times % 2:
            raise ValueError(f"num_times must be even, got {self.num_times}")

    def log_prob(self, flow: Flow, x: Event) -> Scalar:
        return flow.moments.log_prob(x, flow.sigma_min) + jnp.mean(self.estimates(flow, x))

    def estimates(self, flow: Flow, x: Event) -> Float[Array, " n"]:
        """One estimate of the integral per antithetic pair."""
        num_pairs = self.num_times // 2
        key_times, key_noise = jax.random.split(jax.random.key(self.seed))
        uniform = (jnp.arange(num_pairs) + jax.random.uniform(key_times, (num_pairs,))) / num_pairs
        log_low, log_high = jnp.log(1e-2 * flow.sigma_min), jnp.log(flow.sigma_max)
        radii = jnp.exp(log_low + (log_high - log_low) * uniform).astype(x.dtype)
        noises = jax.random.normal(key_noise, (num_pairs, *x.shape), x.dtype)

        def gain(radius, noise):
            return (self._gain(flow, x, radius, noise) + self._gain(flow, x, radius, -noise)) / 2

        return (log_high - log_low) * jax.vmap(gain)(radii, noises)

    def _gain(self, flow: Flow, x: Event, radius: Scalar, noise: Event) -> Scalar:
        """`|n + r s_G|^2 - |n + r s|^2`, as the product of sum and difference."""
        sigma = jnp.sqrt(flow.sigma_min**2 + radius**2)
        noisy = x + radius * noise
        gaussian = (flow.moments.denoise(noisy, sigma) - noisy) / sigma**2
        learned = (flow.denoiser(noisy, sigma) - noisy) / sigma**2
        return radius * jnp.vdot(gaussian - learned, 2 * noise + radius * (gaussian + learned))


class EnergyDensity(AbstractDensity):
    """`log p(x) = -E(x, sigma_min)` up to a constant that nobody knows, by the denoiser's energy.

    For a denoiser with an `energy`: an `EnergyNetwork`, an exact denoiser, or one made of these.
    One evaluation and its gradient, which is the score at `sigma_min`, so that value and gradient
    agree; no flow is solved. It is the law of the energy, which for a trained network is not quite
    that of its flow, and draws of the prior follow the flow.

    The constant cancels in what compares points under one prior: Metropolis and Hamiltonian
    kernels, optimisation, conditional posteriors, and the evidence by `TemperedSMC` and
    `PersistentSMC`, which only ever averages likelihoods. It does not cancel in a mixture of
    priors, in a comparison of priors by `log_prob`, or where parameters of the denoiser are
    unknown too: use `FlowDensity` there. `VI` and `Pathfinder` in the centred form report no
    evidence. In the non-centred form no engine computes a density.

    Raises `NotImplementedError` for a denoiser without an energy.
    """

    is_normalised: ClassVar[bool] = False

    def log_prob(self, flow: Flow, x: Event) -> Scalar:
        """`-E(x, sigma_min)`."""
        return -energy_of(flow.denoiser)(x, jnp.asarray(flow.sigma_min, x.dtype))


class ScoreOnly(AbstractDensity):
    """No density: a prior with draws and scores but no `log_prob`.

    Non-centred inference needs none, and neither do the engines that follow a score: `SGLD`,
    `SGHMC`, `SVGD`, `PredictorCorrector` and `AnnealedLangevin`. What does need one raises
    `NotImplementedError`.
    """

    def log_prob(self, flow: Flow, x: Event) -> Scalar:
        raise NotImplementedError(
            "ScoreOnly has no log_prob. Sample in the non-centred form (the default of "
            "scoreprior.infer, or numpyro's TransformReparam), which needs no density; or with an "
            "engine that follows the score: SGLD, SGHMC, SVGD, PredictorCorrector or "
            "AnnealedLangevin; or give the prior a density: "
            "ScorePrior(flow, density=FlowDensity())"
        )


@eqx.filter_custom_jvp
def with_score(flow: Flow, x: Event, *, value: Callable[..., Scalar], sigma: Sigma) -> Scalar:
    """`value(flow, x)`, whose gradient in `x` is the score of the denoiser at level `sigma`."""
    return value(flow, x)


@with_score.def_jvp
def _with_score_jvp(primals, tangents, *, value, sigma):
    (flow, x), (flow_tangent, x_tangent) = primals, tangents
    out = with_score(flow, x, value=value, sigma=sigma)
    tangent = jnp.zeros_like(out)
    if jax.tree.leaves(flow_tangent):
        tangent += eqx.filter_jvp(lambda f: value(f, x), (flow,), (flow_tangent,))[1]
    if x_tangent is not None:
        score = (flow.denoiser(x, jnp.asarray(sigma, x.dtype)) - x) / sigma**2
        tangent += jnp.vdot(score, x_tangent)
    return out, tangent
