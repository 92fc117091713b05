"""Tasks with many observations of one parameter, and exact draws given all of them.

Three tasks of the benchmark sbibm (Lueckmann et al., AISTATS 2021), whose simulators and reference
draws for single observations come with `sbibm-jax`, and a conjugate Gaussian in two dimensions.
Two of the four have Gaussian posteriors. The likelihoods of the others are functions of two
parameters, so that their posteriors are tables on a fine grid.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

NUM_CELLS = 400
"""Cells of a grid along each axis."""


class Tall(NamedTuple):
    """A task: prior, `simulate(key, theta [n, size])`, and exact draws `exact(x, num, rng)`."""

    prior: dist.Distribution
    simulate: Callable[[Any, Any], Any]
    exact: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
    truth: tuple[float, ...] | None = None  # of all data sets; drawn from the prior where None


def gaussian_posterior(
    x: np.ndarray, prior_variance: float, variance: float
) -> tuple[np.ndarray, float]:
    """Mean and variance of an isotropic Gaussian seen through isotropic Gaussian noise."""
    precision = 1 / prior_variance + len(x) / variance
    return x.sum(0) / variance / precision, 1 / precision


class Table(NamedTuple):
    """A density on a plane: its logarithm at the middles of cells of one size."""

    points: np.ndarray  # [cells, 2]
    logs: np.ndarray
    width: np.ndarray  # [2]


def tabulate(
    log_density: Callable[[np.ndarray], np.ndarray],
    box: np.ndarray,
    *,
    cells: int = NUM_CELLS,
    depth: float = 20.0,
) -> Table:
    """A table of `cells` by `cells`.

    `box` [2, 2], lower and upper corners, is narrowed to where the density is above `exp(-depth)`
    of its largest value until that is most of it. The density is to have one region.
    """
    while True:
        width = (box[1] - box[0]) / cells
        axes = [low + w * (np.arange(cells) + 0.5) for low, w in zip(box[0], width, strict=True)]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
        logs = log_density(points)
        high = points[logs > logs.max() - depth]
        # Two cells more on every side, within the box.
        inner = np.clip([high.min(0) - 2.5 * width, high.max(0) + 2.5 * width], box[0], box[1])
        if ((inner[1] - inner[0]) > 0.7 * (box[1] - box[0])).all():
            return Table(points, logs, width)
        box = inner


def draw_tables(tables: Sequence[Table], num: int, rng: np.random.Generator) -> np.ndarray:
    """Draws [num, 2] of a density in several regions, uniform within cells."""
    points = np.concatenate([table.points for table in tables])
    widths = np.concatenate([np.broadcast_to(t.width, t.points.shape) for t in tables])
    logs = np.concatenate([table.logs + np.log(table.width).sum() for table in tables])
    weights = np.exp(logs - logs.max())
    rows = rng.choice(len(points), num, p=weights / weights.sum())
    return points[rows] + widths[rows] * (rng.random((num, 2)) - 0.5)


def conjugate() -> Tall:
    """Prior `N(0, I)`, likelihood `N(theta, I / 2)`, at (1.5, -1.5)."""

    def simulate(key: Any, theta: Any) -> Any:
        return theta + jnp.sqrt(0.5) * jax.random.normal(key, theta.shape)

    def exact(x: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
        mean, variance = gaussian_posterior(x, 1.0, 0.5)
        return mean + np.sqrt(variance) * rng.normal(size=(num, 2))

    return Tall(dist.Normal(0.0, 1.0).expand([2]).to_event(1), simulate, exact, (1.5, -1.5))


def gaussian_linear() -> Tall:
    """Ten dimensions, variance 0.1 of prior and noise."""

    def exact(x: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
        mean, variance = gaussian_posterior(x, 0.1, 0.1)
        return mean + np.sqrt(variance) * rng.normal(size=(num, 10))

    return Tall(*_of_benchmark("gaussian_linear"), exact)


def two_moons() -> Tall:
    """`x = (|.|-shifted crescent)`: two modes, however many observations.

    With `a = (theta_1 + theta_2) / sqrt 2`, `b = (theta_2 - theta_1) / sqrt 2` and `p = x - (1/4 -
    |a|, b)`, `|p|` is normal with mean 0.1 and standard deviation 0.01, and the direction of `p`
    uniform on the right half circle: the density of `x` has `1 / |p|`.
    """

    def exact(x: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
        def log_density(points: np.ndarray) -> np.ndarray:
            a, b = points.T
            total = np.where((a >= 0) & (a + np.abs(b) <= np.sqrt(2)), 0.0, -np.inf)
            for one in x:
                u, v = one[0] - 0.25 + a, one[1] - b
                r = np.hypot(u, v)
                log = -((r - 0.1) ** 2) / (2 * 0.01**2) - np.log(r)
                total = total + np.where(u > 0, log, -np.inf)
            return total

        # All observations are within 0.2 of the point.
        middle = np.array([0.25 - x[:, 0].mean(), x[:, 1].mean()])
        table = tabulate(log_density, middle + np.array([[-0.4], [0.4]]))
        a, b = draw_tables([table], num, rng).T
        a = a * rng.choice([-1.0, 1.0], num)
        return np.stack([a - b, a + b], 1) / np.sqrt(2)

    return Tall(*_of_benchmark("two_moons"), exact)


SIR_CENTRES, SIR_SCALES = np.log([0.4, 0.125]), np.array([0.5, 0.2])


def infected(rates: np.ndarray, *, steps_per_day: int = 10) -> np.ndarray:
    """Shares of a million infected every 17 days [points, 10], by Runge-Kutta of fourth order."""
    beta, gamma = rates.T
    h = 1 / steps_per_day

    def slope(s: np.ndarray, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        caught = beta * s * i
        return -caught, caught - gamma * i

    s, i = np.full(len(rates), 1 - 1e-6), np.full(len(rates), 1e-6)
    found = [i]
    for _ in range(9):
        for _ in range(17 * steps_per_day):
            s1, i1 = slope(s, i)
            s2, i2 = slope(s + h / 2 * s1, i + h / 2 * i1)
            s3, i3 = slope(s + h / 2 * s2, i + h / 2 * i2)
            s4, i4 = slope(s + h * s3, i + h * i3)
            s = s + h / 6 * (s1 + 2 * s2 + 2 * s3 + s4)
            i = i + h / 6 * (i1 + 2 * i2 + 2 * i3 + i4)
        found.append(i)
    return np.clip(np.stack(found, 1), 1e-10, 1 - 1e-10)


def sir() -> Tall:
    """An epidemic: ten binomial counts among 1,000 of a million."""

    def exact(x: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
        counts, most = x.sum(0), 1000 * len(x)

        def log_density(points: np.ndarray) -> np.ndarray:
            share = infected(np.exp(SIR_CENTRES + SIR_SCALES * points))
            log = counts * np.log(share) + (most - counts) * np.log1p(-share)
            return log.sum(1) - (points**2).sum(1) / 2

        # Coarse until the region is found.
        box = np.array([[-5.0, -5.0], [5.0, 5.0]])
        rough = tabulate(log_density, box, cells=100, depth=400.0)
        box = np.stack([rough.points.min(0), rough.points.max(0)])
        z = draw_tables([tabulate(log_density, box, cells=200)], num, rng)
        return np.exp(SIR_CENTRES + SIR_SCALES * z)

    return Tall(*_of_benchmark("sir"), exact)


def _of_benchmark(name: str) -> tuple[dist.Distribution, Callable[[Any, Any], Any]]:
    import sbibm_jax

    task = sbibm_jax.get_task(name)

    def simulate(key: Any, theta: Any) -> Any:
        return jnp.asarray(task.get_simulator(key)(key, theta), float)

    return task.get_prior_dist(), simulate


TASKS: dict[str, Callable[[], Tall]] = {
    "gaussian_linear": gaussian_linear,
    "two_moons": two_moons,
    "sir": sir,
    "conjugate": conjugate,
}
