"""The whitened probability flow: a bijection between noise and data.

The probability flow `dx/dsigma = (x - D(x, sigma)) / sigma` (Song et al. 2021, eq. 13, in the
coordinate `sigma` of Karras et al. 2022, eq. 4) is integrated in whitened coordinates

    u = diag(1/a(sigma)) R' (x - m),        a(sigma) = sqrt(lam + sigma^2),

of the Gaussian `N(m, R diag(lam) R')` that approximates the data. There it reads

    du/dsigma = - diag(1/a) R' (D - D_G)(x, sigma) / sigma,

with `D_G` the denoiser of that Gaussian: only the non-Gaussian residual is integrated, Gaussian
data need no step at all, and `u(sigma_max) ~ N(0, I)` is right to second order in the moments.
Along the flow the log density changes by the divergence of this field, so that

    log p(x) = log N(u(sigma_max); 0, I) - sum_i log a_i(sigma_min)
               - int_{sigma_min}^{sigma_max} tr d(D - D_G)/dx  dsigma / sigma .

`p` is the law of `X + sigma_min N`. A fixed grid gives a smooth function of `x`; its inverse is the
same solve backwards, exact up to the error of the solver.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreprior._typing import Event, Sigma
from scoreprior._util import check_positive, is_traced
from scoreprior.gaussian import Moments
from scoreprior.solver import EULER as EULER
from scoreprior.solver import HEUN as HEUN
from scoreprior.solver import KUTTA3 as KUTTA3
from scoreprior.solver import RK4 as RK4
from scoreprior.solver import AbstractSolver as AbstractSolver
from scoreprior.solver import AbstractTime as AbstractTime
from scoreprior.solver import Adaptive as Adaptive
from scoreprior.solver import ArctanTime as ArctanTime
from scoreprior.solver import FixedGrid as FixedGrid
from scoreprior.solver import LogRatioTime as LogRatioTime
from scoreprior.solver import LogTime as LogTime
from scoreprior.solver import Multistep as Multistep
from scoreprior.solver import PowerTime as PowerTime
from scoreprior.solver import RungeKutta as RungeKutta


class Flow(eqx.Module):
    """The probability-flow bijection between `u ~ N(0, I)` and data, for one event.

    **Arguments:** `denoiser`, called as `denoiser(x, sigma)`; `moments` of the data, which fix the
    event shape; `sigma_min`, the noise level at which data live, in data units; `sigma_max`, the
    level where noise takes over, by default 10 times the largest standard deviation of the moments
    (lower it to the range that a network was trained on); `solver`, by default a `Multistep` of 30
    steps, 32 evaluations, on a `LogRatioTime` fitted to the moments.
    """

    denoiser: Callable[..., Any]
    moments: Moments
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)
    solver: AbstractSolver

    def __init__(
        self,
        denoiser: Callable[..., Any],
        moments: Moments,
        *,
        sigma_min: float,
        sigma_max: float | None = None,
        solver: AbstractSolver | None = None,
    ):
        check_positive("sigma_min", sigma_min)
        if sigma_max is None:
            sigma_max = 10 * _extreme_scales(moments, "sigma_max")[1]
        check_positive("sigma_max", sigma_max)
        if sigma_max <= sigma_min:
            raise ValueError(f"sigma_max must exceed sigma_min = {sigma_min}, got {sigma_max}")
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable as denoiser(x, sigma), got {denoiser!r}")
        _check_levels(denoiser, sigma_min, sigma_max)
        self.denoiser = denoiser
        self.moments = moments
        self.sigma_min = float(sigma_min)
        self.sigma_max = float(sigma_max)
        self.solver = _default_solver(moments, self.sigma_min) if solver is None else solver

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.moments.event_shape

    def velocity(self, sigma: Sigma, u: Event) -> Event:
        """`du/dsigma` at whitened `u`."""
        law, scales = self.moments, self.moments.scales(sigma)
        denoised = self.denoiser(law.colour(u, sigma), sigma)
        # The Gaussian's denoiser is diagonal here: two products with the basis instead of four.
        residual = law.basis.analyse(denoised - law.mean) - law.eigenvalues / scales * u
        return -residual / (scales * sigma)

    def _residual(self, x: Event, sigma: Sigma) -> Event:
        return self.denoiser(x, sigma) - self.moments.denoise(x, sigma)

    def to_data(self, u: Event) -> Event:
        """Data `x` from noise `u`."""
        u = self.solver.solve(self.velocity, u, self.sigma_max, self.sigma_min)
        return self.moments.colour(u, self.sigma_min)

    def to_noise(self, x: Event) -> Event:
        """Noise `u` from data `x`."""
        u = self.moments.whiten(x, self.sigma_min)
        return self.solver.solve(self.velocity, u, self.sigma_min, self.sigma_max)

    def to_noise_and_log_det(
        self, x: Event, trace: Callable[..., Float[Array, " n"]]
    ) -> tuple[Event, Float[Array, " n"]]:
        """Noise `u` and `log |du/dx|`, in one solve.

        `trace(f, x)` estimates the trace of `df/dx` at `x`, `n` times; `n` estimates of the
        log-determinant come back.
        """

        def field(sigma, state):
            u, _ = state
            x = self.moments.colour(u, sigma)
            divergence = -trace(lambda x: self._residual(x, sigma), x) / sigma
            return self.velocity(sigma, u), divergence

        u = self.moments.whiten(x, self.sigma_min)
        start = jax.eval_shape(field, self.sigma_min, (u, None))[1]
        log_det = jnp.full(start.shape, -self.moments.log_det(self.sigma_min), start.dtype)
        return self.solver.solve(field, (u, log_det), self.sigma_min, self.sigma_max)


def _default_solver(moments: Moments, sigma_min: float) -> Multistep:
    smallest, largest = _extreme_scales(moments, "solver")
    low = max(smallest, sigma_min)
    return Multistep(30, LogRatioTime(low, max(largest, 2 * low)))


def _check_levels(denoiser: Any, sigma_min: float, sigma_max: float) -> None:
    """Raise where the noise levels of a flow leave those of its denoiser, by over 1e-4."""
    low, high = getattr(denoiser, "level_range", (0.0, math.inf))
    if is_traced(low) or is_traced(high):
        return
    if sigma_min < low * (1 - 1e-4):
        raise ValueError(
            f"sigma_min must be at least {float(low):g}, the smallest noise level of the denoiser, "
            f"got {sigma_min:g}"
        )
    if sigma_max > high * (1 + 1e-4):
        raise ValueError(
            f"sigma_max must be at most {float(high):g}, the largest noise level of the denoiser, "
            f"got {sigma_max:g}"
        )


def _extreme_scales(moments: Moments, argument: str) -> tuple[float, float]:
    """Smallest and largest standard deviation of the moments."""
    if is_traced(moments.eigenvalues):
        raise ValueError(f"{argument} must be given when moments are traced by jax, got None")
    scales = np.sqrt(np.asarray(moments.eigenvalues))
    return float(scales.min()), float(scales.max())
