"""Samplers: one step from a noise level to the next below."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from scoreprior._typing import Event, Scalar
from scoreprior._util import check_positive

Denoise = Callable[[Event, Scalar], Event]
"""A denoiser with its context fixed."""

Memory = PyTree[Array]
"""What a multistep sampler keeps from one step to the next."""


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

    def num_evaluations(self, x: Event) -> int:
        """Calls of the denoiser in one step of an event like `x`, found without computation."""
        calls = 0

        def denoise(x: Event, sigma: Scalar) -> Event:
            nonlocal calls
            calls += 1
            return x

        def step(x: Event) -> Any:
            noise = jnp.zeros((self.num_noises, *x.shape), x.dtype)
            one = jnp.ones((), x.dtype)
            return self.step(Stage(denoise, one, one / 2, noise), x, self.init(x))

        jax.eval_shape(step, x)
        return calls


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


class StochasticHeun(AbstractSampler):
    """The improved Euler step of the reverse SDE (Roberts 2012; Jolicoeur-Martineau et al. 2021).

    With `h = sigma^2 - sigma_next^2` and the score `s`, `x + h s(x, sigma) + sqrt(h) n = y` and

        x + h (s(x, sigma) + s(y, sigma_next)) / 2 + sqrt(h) n .

    Two evaluations. The noise is additive in the coordinate `sigma^2`, so laws are right to second
    order. `solve_adaptive` takes the same step with a size of its own.
    """

    num_noises: ClassVar[int] = 1

    def step(self, stage: Stage, x: Event, memory: Memory) -> tuple[Event, Memory]:
        h = stage.sigma**2 - stage.sigma_next**2
        return improved_euler(stage, x, jnp.sqrt(h) * stage.noise[0])[1], memory


def improved_euler(stage: Stage, x: Event, increment: Event) -> tuple[Event, Event]:
    """Euler's step and the improved one, with an `increment` of Brownian motion in `sigma^2`."""
    denoise, sigma, sigma_next, _ = stage
    h = sigma**2 - sigma_next**2
    slope = (denoise(x, sigma) - x) / sigma**2
    ahead = x + h * slope + increment
    slope_next = (denoise(ahead, sigma_next) - ahead) / sigma_next**2
    return ahead, x + h * (slope + slope_next) / 2 + increment


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
