"""Unconditional draws: noise-level grids and samplers.

A sampler moves `x_t` from the law of `X + sigma_0 N` down a grid `sigma_0 > ... > sigma_n > 0`. Its
draws have the law of `X + sigma_n N`, up to the error of the steps; `denoise_last=True` replaces
each by its posterior mean `D(x, sigma_n)`, which is what is usually shown, but not what a density
at `sigma_n` describes.

All samplers integrate one of

    probability flow   dx/dsigma = (x - D(x, sigma)) / sigma
    reverse SDE        dx = 2 (x - D) / sigma dsigma + sqrt(2 sigma |dsigma|) dW

(Karras et al., NeurIPS 2022, eqs. 1 and 6) or, by `Ancestral`, what lies between. A step is a
deterministic function of its noise, so everything here can be differentiated and replayed.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from scoreprior._typing import Context, Event, Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.gaussian import Moments

Denoise = Callable[[Event, Scalar], Event]
"""A denoiser with its context fixed."""

Memory = PyTree[Array]
"""What a multistep sampler keeps from one step to the next."""


class AbstractGrid(eqx.Module):
    """Decreasing noise levels from `sigma_max` to `sigma_min`; `grid(num_steps)` has one more."""

    sigma_min: float
    sigma_max: float

    def __check_init__(self):
        check_positive("sigma_min", self.sigma_min)
        check_positive("sigma_max", self.sigma_max)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    def __call__(self, num_steps: int) -> Float[Array, " num_levels"]:
        """`num_steps + 1` levels, the first `sigma_max` and the last `sigma_min`."""
        check_count("num_steps", num_steps)
        levels = self.inverse(
            jnp.linspace(self.warp(self.sigma_max), self.warp(self.sigma_min), num_steps + 1)
        )
        return levels.at[0].set(self.sigma_max).at[-1].set(self.sigma_min)

    @abstractmethod
    def warp(self, sigma: float | Array) -> Array:
        """The coordinate in which the grid is even."""

    @abstractmethod
    def inverse(self, coordinate: Array) -> Array:
        """The noise level at a coordinate."""


class LogGrid(AbstractGrid):
    """Even in `log sigma`."""

    def warp(self, sigma: float | Array) -> Array:
        return jnp.log(sigma)

    def inverse(self, coordinate: Array) -> Array:
        return jnp.exp(coordinate)


class EDMGrid(AbstractGrid):
    """Even in `sigma^(1/rho)` (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0

    def warp(self, sigma: float | Array) -> Array:
        return jnp.asarray(sigma) ** (1 / self.rho)

    def inverse(self, coordinate: Array) -> Array:
        return coordinate**self.rho


class ArctanGrid(AbstractGrid):
    """Even in `arctan(sigma / scale)`, `scale` the standard deviation of the data.

    For Gaussian data of that scale the probability flow moves at constant speed along this grid.
    """

    scale: float = eqx.field(kw_only=True)

    def warp(self, sigma: float | Array) -> Array:
        return jnp.arctan(sigma / self.scale)

    def inverse(self, coordinate: Array) -> Array:
        return self.scale * jnp.tan(coordinate)


class Stage(NamedTuple):
    """What one step is given besides the event."""

    denoise: Denoise
    sigma: Scalar  # the level of the event
    sigma_next: Scalar  # the level to reach, below sigma
    noise: Float[Array, "num_noises *event"]  # independent standard normal


class AbstractSampler(eqx.Module):
    """One step of a sampler from noise level `sigma` to `sigma_next < sigma`.

    `num_noises` standard normal events enter each step; `init` gives the memory of the multistep
    methods.
    """

    num_noises: ClassVar[int] = 0

    def init(self, x: Event) -> Memory:
        """Memory before the first step."""
        return ()

    @abstractmethod
    def step(self, stage: Stage, x: Event, memory: Memory) -> tuple[Event, Memory]:
        """The event at `sigma_next` and the memory for the step after."""


class Euler(AbstractSampler):
    """DDIM (Song et al., ICLR 2021): `x + (sigma_next - sigma) (x - D) / sigma`. First order."""

    def step(self, stage: Stage, x: Event, memory: Memory) -> tuple[Event, Memory]:
        ratio = stage.sigma_next / stage.sigma
        return ratio * x + (1 - ratio) * stage.denoise(x, stage.sigma), memory


class Heun(AbstractSampler):
    """The trapezoidal step (Karras et al. 2022, algorithm 1). Two evaluations, second order."""

    def step(self, stage: Stage, x: Event, memory: Memory) -> tuple[Event, Memory]:
        denoise, sigma, sigma_next, _ = stage
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + (sigma_next - sigma) * slope
        slope_next = (ahead - denoise(ahead, sigma_next)) / sigma_next
        return x + (sigma_next - sigma) * (slope + slope_next) / 2, memory


class MultistepMemory(NamedTuple):
    """What `DPMSolver` keeps of the step before."""

    x_hat: Event  # [*event]
    sigma: Scalar


class DPMSolver(AbstractSampler):
    """DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2). One evaluation, second order.

    An exponential step in `log sigma` with `D` extrapolated linearly from the last two levels.
    """

    def init(self, x: Event) -> MultistepMemory:
        # A level before the first at infinity makes the first step one of first order.
        return MultistepMemory(jnp.zeros_like(x), jnp.asarray(jnp.inf, x.dtype))

    def step(self, stage: Stage, x: Event, memory: Memory) -> tuple[Event, Memory]:
        denoise, sigma, sigma_next, _ = stage
        x_hat = denoise(x, sigma)
        weight = jnp.log(sigma / sigma_next) / jnp.log(memory.sigma / sigma) / 2
        extrapolated = x_hat + weight * (x_hat - memory.x_hat)
        ratio = sigma_next / sigma
        return ratio * x + (1 - ratio) * extrapolated, MultistepMemory(x_hat, sigma)


class GradientEstimationMemory(NamedTuple):
    """What `GradientEstimation` keeps of the step before."""

    slope: Event  # [*event]
    weight: Scalar  # 0 before the first step, then 1


class GradientEstimation(AbstractSampler):
    """Euler's step along a slope that also looks back (Permenter & Yuan, ICML 2024).

    With the slope `d = (x - D) / sigma` and that of the step before,

        x + (sigma_next - sigma) (gamma d + (1 - gamma) d_before),

    and Euler's step first. One evaluation. The authors take `gamma = 2`: of first order, with an
    error as large as Euler's and of the other sign once steps are small. `gamma = 1` is `Euler`,
    and `gamma = 1.5` the Adams-Bashforth method, of second order on a grid that is smooth.

    **Arguments:** `gamma`, at least 1.
    """

    gamma: float

    def __check_init__(self):
        if not 1 <= self.gamma < float("inf"):
            raise ValueError(f"gamma must be finite and at least 1, got {self.gamma}")

    def init(self, x: Event) -> GradientEstimationMemory:
        return GradientEstimationMemory(jnp.zeros_like(x), jnp.zeros((), x.dtype))

    def step(self, stage: Stage, x: Event, memory: Memory) -> tuple[Event, Memory]:
        denoise, sigma, sigma_next, _ = stage
        slope = (x - denoise(x, sigma)) / sigma
        ahead = (self.gamma - 1) * memory.weight * (slope - memory.slope)
        memory = GradientEstimationMemory(slope, jnp.ones_like(memory.weight))
        return x + (sigma_next - sigma) * (slope + ahead), memory


class Ancestral(AbstractSampler):
    """The family from DDIM to the ancestral step (Song et al., ICLR 2021, eqs. 12 and 16).

    With `r = sigma_next / sigma` and `tau = eta^2 (1 - r^2)`,

        D + r sqrt(1 - tau) (x - D) + sigma_next sqrt(tau) n .

    `eta = 1`, the step of DDPM, draws from `p(x_next | x, X = D)`, and `eta = 0` is `Euler`. For
    data at one point the law is right at every step. First order. One evaluation.
    """

    eta: float = 1.0

    num_noises: ClassVar[int] = 1

    def __check_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def step(self, stage: Stage, x: Event, memory: Memory) -> tuple[Event, Memory]:
        denoise, sigma, sigma_next, noise = stage
        x_hat, ratio = denoise(x, sigma), sigma_next / sigma
        # Roots of sums and products: a difference may round below zero, and sqrt(tau) has no
        # derivative where eta is zero.
        kept = ratio * jnp.sqrt(1 - self.eta**2 + (self.eta * ratio) ** 2)
        added = sigma_next * self.eta * jnp.sqrt((1 - ratio) * (1 + ratio))
        return x_hat + kept * (x - x_hat) + added * noise[0], memory


class HalfNoise(AbstractSampler):
    """Reverse SDE with half of the noise before the score and half after it.

    With `h = sigma^2 - sigma_next^2`, `x + sqrt(h/2) z_1 = y` and
    `y + h (D(y, sigma) - y) / sigma^2 + sqrt(h/2) z_2`. One evaluation; the variance is right to
    second order (Li et al., "Accelerating convergence of score-based diffusion models, provably",
    ICML 2024).
    """

    num_noises: ClassVar[int] = 2

    def step(self, stage: Stage, x: Event, memory: Memory) -> tuple[Event, Memory]:
        denoise, sigma, sigma_next, noise = stage
        h = sigma**2 - sigma_next**2
        y = x + jnp.sqrt(h / 2) * noise[0]
        return y + h / sigma**2 * (denoise(y, sigma) - y) + jnp.sqrt(h / 2) * noise[1], memory


class Churned(AbstractSampler):
    """Heun's step from a level raised by fresh noise (Karras et al. 2022, eq. 6 and algorithm 2).

    Within `[sigma_low, sigma_high]` noise first raises `sigma` to `(1 + churn) sigma`. `churn` is
    the paper's `S_churn / N`, there capped at `sqrt(2) - 1`; `noise_scale` is its `S_noise`.
    """

    churn: float
    sigma_low: float = 0.0
    sigma_high: float = float("inf")
    noise_scale: float = 1.0

    num_noises: ClassVar[int] = 1

    def __check_init__(self):
        if not 0 <= self.churn <= 2**0.5 - 1:
            raise ValueError(f"churn must lie in [0, sqrt(2) - 1], got {self.churn}")
        if not 0 <= self.sigma_low < self.sigma_high:
            raise ValueError(
                "sigma_low must be non-negative and below sigma_high, got "
                f"{self.sigma_low} and {self.sigma_high}"
            )
        check_positive("noise_scale", self.noise_scale)

    def step(self, stage: Stage, x: Event, memory: Memory) -> tuple[Event, Memory]:
        sigma, noise = stage.sigma, stage.noise
        active = (sigma >= self.sigma_low) & (sigma <= self.sigma_high)
        churn = jnp.where(active, self.churn, 0.0)
        raised = sigma * (1 + churn)
        # sqrt(raised^2 - sigma^2), where rounding could leave the root of a negative number.
        added = sigma * jnp.sqrt(churn * (2 + churn)) * self.noise_scale
        return Heun().step(stage._replace(sigma=raised), x + added * noise[0], memory)


@eqx.filter_jit
def solve(
    denoiser: AbstractDenoiser,
    x_init: Event,
    *,
    key: Key,
    sigmas: Float[Array, " num_levels"],
    sampler: AbstractSampler,
    context: Context = None,
) -> Event:
    """Carry one event `x_init` at noise level `sigmas[0]` down to `sigmas[-1]`."""
    if sigmas.shape[0] < 2:
        raise ValueError(f"sigmas must hold at least two levels, got {sigmas.shape[0]}")
    sigmas = sigmas.astype(x_init.dtype)

    def denoise(x: Event, sigma: Scalar) -> Event:
        return denoiser(x, sigma, context)

    def step(carry: tuple[Event, Memory], level: tuple[Scalar, Scalar, Key]) -> tuple:
        sigma, sigma_next, step_key = level
        noise = jax.random.normal(step_key, (sampler.num_noises, *x_init.shape), x_init.dtype)
        return sampler.step(Stage(denoise, sigma, sigma_next, noise), *carry), None

    keys = jax.random.split(key, sigmas.shape[0] - 1)
    (x, _), _ = jax.lax.scan(step, (x_init, sampler.init(x_init)), (sigmas[:-1], sigmas[1:], keys))
    return x


@eqx.filter_jit
def sample(
    denoiser: AbstractDenoiser,
    moments: Moments,
    num_samples: int,
    *,
    key: Key,
    sigmas: Float[Array, " num_levels"],
    sampler: AbstractSampler,
    context: Context = None,
    denoise_last: bool = False,
) -> Float[Array, "num_samples *event"]:
    """Draw `num_samples` events, [num_samples, *event], in data units.

    Starts from the moment-matched `N(m, C + sigmas[0]^2 I)`, right to second order at any level
    ("How much is enough?", Franzese et al. 2023); moments with zero eigenvalues and mean give the
    usual `N(0, sigmas[0]^2 I)`. `sigmas` comes from a grid, `LogGrid(0.01, 100.0)(32)`. `context`
    is shared by all draws.
    """
    check_count("num_samples", num_samples)

    def one(key: Key) -> Event:
        start, steps = jax.random.split(key)
        x = moments.sample(start, sigmas[0])
        x = solve(denoiser, x, key=steps, sigmas=sigmas, sampler=sampler, context=context)
        return denoiser(x, sigmas[-1], context) if denoise_last else x

    return jax.vmap(one)(jax.random.split(key, num_samples))
