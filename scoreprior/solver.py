"""Solvers of `dy/dsigma = f(sigma, y)` between two noise levels, and their time variables.

A grid is uniform in a time variable `t(sigma)`. A fixed grid makes the solution a smooth function
of its start; solving backwards inverts it, up to the error of the solver.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from scoreprior._typing import Field, PyTree, Scalar, Sigma
from scoreprior._util import check_count, check_positive


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


ADAMS3 = (23 / 12, -16 / 12, 5 / 12, 0.0)
ADAMS = tuple((a + b) / 48 for a, b in zip((46, -32, 10, 0), (55, -59, 37, -9), strict=True))


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


class Multistep(AbstractSolver):
    """A fixed number of Adams-Bashforth steps, uniform in a time variable: one evaluation each.

    Third order, by the mean of the four-step and the three-step method (Hairer, Norsett & Wanner
    1993, III.1): half the error of the one, stable further than the other. Two midpoint steps start
    it. Twice as many nodes as a `FixedGrid` at equal cost; a gradient keeps four states per step.
    """

    num_steps: int = eqx.field(static=True)
    time: AbstractTime = LogTime()

    def __check_init__(self):
        check_count("num_steps", self.num_steps, least=3)

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the field in one solve."""
        return self.num_steps + 2

    def solve(self, field: Field, y: PyTree[Array], start: Sigma, stop: Sigma) -> PyTree[Array]:
        ends = self.time.time(start), self.time.time(stop)
        times = jnp.linspace(*ends, self.num_steps + 1, dtype=jnp.result_type(*jax.tree.leaves(y)))
        timed, h = _in_time(field, self.time), times[1] - times[0]

        @jax.checkpoint
        def midpoint(y, t):
            slope = timed(t, y)
            middle = timed(t + h / 2, _combine(y, h, (0.5,), [slope]))
            return _combine(y, h, (1.0,), [middle]), slope

        @jax.checkpoint
        def adams(state, step):
            (y, past), (t, weights) = state, step
            slopes = [timed(t, y), *past]
            weigh = lambda leaf, *ks: leaf + h * sum(map(jnp.multiply, weights, ks))  # noqa: E731
            return (jax.tree.map(weigh, y, *slopes), slopes[:3]), None

        y, slopes = jax.lax.scan(midpoint, y, times[:2])
        past = [jax.tree.map(lambda k, i=i: k[i], slopes) for i in (1, 0, 0)]  # the last is unused
        weights = jnp.asarray([ADAMS3] + [ADAMS] * (self.num_steps - 3), times.dtype)
        return jax.lax.scan(adams, (y, past), (times[2:-1], weights))[0][0]


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


def _import_diffrax() -> Any:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("Adaptive needs diffrax: pip install 'scoreprior[diffrax]'") from error
    return diffrax
