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
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event, Field, PyTree, Scalar, Sigma
from scoreprior._util import check_count, check_positive, is_traced
from scoreprior.gaussian import Moments


class AbstractTime(eqx.Module):
    """A monotone time variable `t(sigma)`: where a grid uniform in `t` puts its steps."""

    @abstractmethod
    def time(self, sigma: Sigma) -> Scalar:
        """`t` at noise level `sigma`."""

    @abstractmethod
    def sigma(self, time: Scalar) -> Scalar:
        """Noise level at time `t`, the inverse of `time`."""


class LogTime(AbstractTime):
    """`t = log sigma`."""

    def time(self, sigma: Sigma) -> Scalar:
        return jnp.log(sigma)

    def sigma(self, time: Scalar) -> Scalar:
        return jnp.exp(time)


class ArctanTime(AbstractTime):
    """`t = arctan(sigma / scale)`: dense around `scale`, sparse above it."""

    scale: float = eqx.field(static=True)

    def __check_init__(self):
        check_positive("scale", self.scale)

    def time(self, sigma: Sigma) -> Scalar:
        return jnp.arctan(sigma / self.scale)

    def sigma(self, time: Scalar) -> Scalar:
        return self.scale * jnp.tan(time)


class PowerTime(AbstractTime):
    """`t = sigma^(1/rho)`; `rho = 7` is the sampling grid of Karras et al. 2022, eq. 5."""

    rho: float = eqx.field(static=True, default=7.0)

    def __check_init__(self):
        check_positive("rho", self.rho)

    def time(self, sigma: Sigma) -> Scalar:
        return jnp.asarray(sigma) ** (1 / self.rho)

    def sigma(self, time: Scalar) -> Scalar:
        return time**self.rho


class LogRatioTime(AbstractTime):
    """`t = log((sigma + low) / (sigma + high))`.

    Linear below `low`, logarithmic between, and sparse like `1 / sigma` above `high`.

    With the smallest and largest standard deviation of the data as `low` and `high`, steps fall
    where the flow turns: below the one, data are resolved; above the other, they are Gaussian.
    """

    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    def __check_init__(self):
        check_positive("low", self.low)
        if not self.high > self.low:
            raise ValueError(f"high must exceed low = {self.low}, got {self.high}")

    def time(self, sigma: Sigma) -> Scalar:
        return jnp.log((sigma + self.low) / (sigma + self.high))

    def sigma(self, time: Scalar) -> Scalar:
        return (self.high * jnp.exp(time) - self.low) / -jnp.expm1(time)


class RungeKutta(NamedTuple):
    """An explicit Runge-Kutta method: `nodes` c, lower-triangular `matrix` a, `weights` b."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


EULER = RungeKutta((0.0,), ((),), (1.0,))
HEUN = RungeKutta((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2))
KUTTA3 = RungeKutta((0.0, 1 / 2, 1.0), ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6))
RK4 = RungeKutta(
    (0.0, 1 / 2, 1 / 2, 1.0),
    ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    (1 / 6, 1 / 3, 1 / 3, 1 / 6),
)


class AbstractSolver(eqx.Module):
    """Integrates `dy/dsigma = f(sigma, y)` from one noise level to another."""

    @abstractmethod
    def solve(self, field: Field, y: PyTree[Array], start: Sigma, stop: Sigma) -> PyTree[Array]:
        """`y` at noise level `stop`, given `y` at `start`."""


class FixedGrid(AbstractSolver):
    """A fixed number of Runge-Kutta steps, uniform in a time variable.

    The number of evaluations does not depend on the point, so densities are smooth and batches
    waste nothing. Every step is rematerialised in reverse mode, so the memory of a gradient is one
    state per step.
    """

    num_steps: int = eqx.field(static=True)
    time: AbstractTime = LogTime()
    method: RungeKutta = eqx.field(static=True, default=KUTTA3)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the field in one solve."""
        return self.num_steps * len(self.method.nodes)

    def solve(self, field: Field, y: PyTree[Array], start: Sigma, stop: Sigma) -> PyTree[Array]:
        ends = self.time.time(start), self.time.time(stop)
        times = jnp.linspace(*ends, self.num_steps + 1, dtype=jnp.result_type(*jax.tree.leaves(y)))
        timed = _in_time(field, self.time)

        @jax.checkpoint
        def step(y, t):
            return _runge_kutta_step(self.method, timed, y, t[0], t[1] - t[0]), None

        return jax.lax.scan(step, y, jnp.stack([times[:-1], times[1:]], 1))[0]


class Adaptive(AbstractSolver):
    """An adaptive solve by diffrax (the `diffrax` extra), to tolerances `rtol` and `atol`.

    `method` is a diffrax solver, `Tsit5()` when `None`; `adjoint` a diffrax adjoint, by default
    `RecursiveCheckpointAdjoint()`, which has reverse mode only (`DirectAdjoint()` has both). Step
    sizes are chosen for every point by itself, so a density never depends on its neighbours.
    """

    rtol: float = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    time: AbstractTime = LogTime()
    method: Any = None
    adjoint: Any = None
    max_steps: int = eqx.field(static=True, default=4096)

    def __check_init__(self):
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)
        check_count("max_steps", self.max_steps)

    def solve(self, field: Field, y: PyTree[Array], start: Sigma, stop: Sigma) -> PyTree[Array]:
        return self.solve_and_count(field, y, start, stop)[0]

    def solve_and_count(
        self, field: Field, y: PyTree[Array], start: Sigma, stop: Sigma
    ) -> tuple[PyTree[Array], Array]:
        """The solution and the number of steps tried, accepted or not."""
        diffrax = _import_diffrax()
        timed = _in_time(field, self.time)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: timed(t, y)),
            diffrax.Tsit5() if self.method is None else self.method,
            self.time.time(start),
            self.time.time(stop),
            None,
            y,
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            adjoint=diffrax.RecursiveCheckpointAdjoint() if self.adjoint is None else self.adjoint,
            max_steps=self.max_steps,
        )
        return jax.tree.map(lambda leaf: leaf[-1], solution.ys), solution.stats["num_steps"]


class Flow(eqx.Module):
    """The probability-flow bijection between `u ~ N(0, I)` and data, for one event.

    **Arguments:** `denoiser`, called as `denoiser(x, sigma)`; `moments` of the data, which fix the
    event shape; `sigma_min`, the noise level at which data live, in data units; `sigma_max`, the
    level where noise takes over, by default 10 times the largest standard deviation of the moments
    (lower it to the range that a network was trained on); `solver`, by default 10 steps of Kutta's
    third-order method, 30 evaluations, on a `LogRatioTime` fitted to the moments.
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
        x = self.moments.colour(u, sigma)
        residual = self.moments.basis.analyse(self._residual(x, sigma))
        return -residual / (self.moments.scales(sigma) * sigma)

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


def _runge_kutta_step(method: RungeKutta, field: Field, y: Any, t: Scalar, h: Scalar) -> Any:
    slopes: list[Any] = []
    for node, row in zip(method.nodes, method.matrix, strict=True):
        stage = _combine(y, h, row, slopes)
        slopes.append(field(t + node * h, stage))
    return _combine(y, h, method.weights, slopes)


def _combine(y: Any, h: Scalar, weights: tuple[float, ...], slopes: list[Any]) -> Any:
    """`y + h sum_i w_i k_i`, leaf by leaf."""
    terms = [(w, k) for w, k in zip(weights, slopes, strict=True) if w != 0]
    return jax.tree.map(
        lambda leaf, *ks: leaf + h * sum(w * k for (w, _), k in zip(terms, ks, strict=True)),
        y,
        *(k for _, k in terms),
    )


def _in_time(field: Field, time: AbstractTime) -> Field:
    """The field `dy/dt` of `dy/dsigma`, for `sigma(t)`."""

    def timed(t, y):
        sigma, rate = jax.jvp(time.sigma, (t,), (jnp.ones_like(t),))
        return jax.tree.map(lambda slope: rate * slope, field(sigma, y))

    return timed


def _default_solver(moments: Moments, sigma_min: float) -> FixedGrid:
    smallest, largest = _extreme_scales(moments, "solver")
    low = max(smallest, sigma_min)
    return FixedGrid(10, LogRatioTime(low, max(largest, 2 * low)))


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
    variances = moments.eigenvalues
    return float(jnp.sqrt(variances.min())), float(jnp.sqrt(variances.max()))


def _import_diffrax() -> Any:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("Adaptive needs diffrax: pip install 'scoreprior[diffrax]'") from error
    return diffrax
