"""Posteriors of many observations from exact scores of each: every method against the truth.

    python examples/benchmarks/composed_scores.py [--quick] [--toy mixture-1d mixture-5d gaussian]

Mixture toys (Linhart et al. 2024): prior `N(0, I)`, likelihood half `N(z, 2.25 B)`, half
`N(z, B / 9)`, `B` diagonal from 0.6 to 1.4, one in one dimension. Scores of the posteriors of
single observations are exact. Mean over data sets of the Wasserstein-1 distance to exact draws over
the posterior's standard deviation (sliced, over 200 directions, in five dimensions), beside that of
independent exact draws, the floor, and the error of `log p(x_1..n) - sum_i log p(x_i)`.

The Gaussian toy (the same authors, section 4.1) has prior `N(mu, diag(s^2))`, `mu` uniform in
[-10, 10], `s` in [0.1, 25.1], and correlated noise, `0.2 I + 0.8`; scores are exact, or off by
`eps` times a fixed random network with values in [-1, 1] as noise prediction. The largest
Wasserstein-1 distance over 200 directions, in units of the data, less that of exact draws.

Ours is `sbi.compose` by clouds of four times as many particles as draws (`feynman_kac`), with and
without bridge; beside it the
sum of scores by a reverse diffusion of 1,000 steps, `GAUSS` of 1,000, `JAC` of 400, F-NPSE by
annealed Langevin (400 levels, 5 steps) and damping to 0.01. CPU, hours for all; a stopped program
goes on where it was.
"""

import itertools
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from common import Progress, arguments, show, write

from scoreprior import Flow, Moments, ScorePrior, sbi
from scoreprior import feynman_kac as fk
from scoreprior.denoise import AbstractDenoiser, Gaussian, GaussianMixture
from scoreprior.sample import Ancestral, LogGrid, sample

SIGMA_MIN, SIGMA_MAX = 3e-3, 30.0
NOISES = np.array([2.25, 1 / 9])


class Perturbed(AbstractDenoiser):
    """An exact denoiser whose noise prediction is off by `eps net(z / sqrt(1 + sigma^2), ...)`."""

    exact: AbstractDenoiser
    net: eqx.nn.MLP
    x: jax.Array
    eps: jax.Array

    def __call__(self, x: Any, sigma: Any, context: Any = None) -> Any:
        told = jnp.concatenate([x / jnp.sqrt(1 + sigma**2), self.x, jnp.log(sigma)[None] / 4])
        return self.exact(x, sigma) - sigma * self.eps * self.net(told)


def prior_of(denoiser: AbstractDenoiser, moments: Moments) -> ScorePrior:
    """At the noise levels of the benchmark."""
    return ScorePrior(Flow(denoiser, moments, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX))


def standard(size: int) -> Gaussian:
    """`N(0, I)`."""
    return Gaussian(Moments.dense(jnp.zeros(size), jnp.eye(size)))


class Case:
    """Posteriors of single observations in `z`, exact draws given all, and the evidence ratio."""

    def __init__(self, posteriors: list[ScorePrior], exact: Callable[..., Any], ratio: float):
        self.posteriors, self.exact, self.ratio = posteriors, exact, ratio
        self.size = posteriors[0].event_shape[0]


def mixture(size: int, n: int, seed: int) -> Case:
    """One data set of a mixture toy; more than ten observations in one dimension only."""
    rng = np.random.default_rng(seed)
    shape = np.linspace(0.6, 1.4, size) if size > 1 else np.ones(1)
    z = rng.normal(size=size)
    c = np.where(rng.random(n) < 0.5, *NOISES)
    x = z + np.sqrt(c[:, None] * shape) * rng.normal(size=(n, size))
    each = NOISES[:, None] * shape
    posteriors, log_single = [], 0.0
    for one in x:
        logs = -np.sum(one**2 / (1 + each) + np.log(2 * np.pi * (1 + each)), 1) / 2
        log_single += np.logaddexp.reduce(logs) - np.log(2)
        weights = np.exp(logs - np.logaddexp.reduce(logs))
        law = GaussianMixture.diagonal(
            *map(jnp.asarray, (weights, one / (1 + each), each / (1 + each)))
        )
        posteriors.append(prior_of(law, law.moments()))
    if n > 10:
        grid = np.linspace(-6, 6, 40_001)
        logs = -(grid**2) / 2 - np.log(2 * np.pi) / 2
        for one in x:
            terms = [-((one - grid) ** 2) / (2 * c) - np.log(8 * np.pi * c) / 2 for c in NOISES]
            logs = logs + np.logaddexp(*terms)
        log_all = np.logaddexp.reduce(logs) + np.log(grid[1] - grid[0])
        masses = np.exp(logs - np.logaddexp.reduce(logs))
        means, variances = grid[:, None], np.full((len(grid), 1), (grid[1] - grid[0]) ** 2 / 12)
    else:
        masses, means, variances, log_all = _all_components(x, each)

    def exact(num: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(masses), num, p=masses / masses.sum())
        return means[rows] + np.sqrt(variances[rows]) * rng.normal(size=(num, size))

    return Case(posteriors, exact, float(log_all - log_single))


def _all_components(x: np.ndarray, each: np.ndarray) -> tuple[Any, ...]:
    logs, means, variances = [], [], []
    for rows in itertools.product(each, repeat=len(x)):
        c = np.stack(rows)
        precision, pull = 1 + (1 / c).sum(0), (x / c).sum(0)
        log = -np.sum(x**2 / c + np.log(2 * np.pi * c)) / 2 - len(x) * np.log(2)
        logs.append(log + np.sum(pull**2 / precision - np.log(precision)) / 2)
        means.append(pull / precision), variances.append(1 / precision)
    log_all = np.logaddexp.reduce(logs)
    return np.exp(logs - log_all), np.stack(means), np.stack(variances), log_all


def gaussian(size: int, n: int, eps: float, seed: int) -> tuple[Case, np.ndarray]:
    """One data set of the Gaussian toy in `z = (theta - mu) / s`, and `s`."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(0.1, 25.1, size)
    noise = (0.2 * np.eye(size) + 0.8) / np.outer(s, s)
    z = rng.normal(size=size)
    x = z + rng.multivariate_normal(np.zeros(size), noise, n)
    inverse = np.linalg.inv(noise)
    net = eqx.nn.MLP(2 * size + 1, size, 64, 2, jnp.tanh, jnp.tanh, key=jax.random.key(seed))
    moments = Moments.dense(jnp.zeros(size), jnp.linalg.inv(jnp.asarray(np.eye(size) + inverse)))
    posteriors = []
    for one in x:
        mean = jnp.asarray(np.linalg.solve(np.eye(size) + inverse, inverse @ one))
        law = eqx.tree_at(lambda m: m.mean, moments, mean)
        posteriors.append(
            prior_of(Perturbed(Gaussian(law), net, jnp.asarray(one), jnp.asarray(eps)), law)
        )
    covariance = np.linalg.inv(np.eye(size) + n * inverse)
    mean = covariance @ inverse @ x.sum(0)

    def exact(num: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).multivariate_normal(mean, covariance, num)

    return Case(posteriors, exact, float("nan")), s


def by_cloud(case: Case, num: int, key: Any, num_steps: int, bridge: bool) -> tuple[Any, float]:
    """`num` draws of a cloud of four times as many, and its estimate of the evidence ratio."""
    product = sbi.compose(case.posteriors, standard(case.size), bridge=bridge)
    size = 4 * num
    state = _run(product.composed(num_steps), size, key)
    key_rows, key_some = jax.random.split(jax.random.fold_in(key, 1))
    rows = fk.systematic(key_rows, jax.nn.softmax(state.log_weights), size)
    rows = jax.random.permutation(key_some, rows)[:num]
    return np.asarray(state.particles[rows]), float(state.log_evidence)


@eqx.filter_jit
def _run(chain: fk.Composed, num: int, key: Any) -> fk.FKState:
    return fk.run(chain.model(), fk.Resampling(), num, key)[0]


def by_score(kind: Callable[..., Any], num_steps: int, case: Any, num: int, key: Any) -> Any:
    """Draws by the reverse diffusion of a composite score."""
    score = kind(sbi.compose(case.posteriors, standard(case.size), bridge=False))
    start = Moments.dense(jnp.zeros(case.size), jnp.zeros((case.size, case.size)))
    first = case.posteriors[0].flow
    sigmas = LogGrid(first.sigma_min, first.sigma_max)(num_steps)
    draws = sample(score, start, num, key=key, sigmas=sigmas, sampler=Ancestral())
    return np.asarray(draws), float("nan")


def by_langevin(case: Any, num: int, key: Any, *, num_levels: int = 400) -> Any:
    """Draws by annealed Langevin on the path of F-NPSE."""
    score = sbi.FNPSE(sbi.compose(case.posteriors, standard(case.size), bridge=False))
    first = case.posteriors[0].flow
    levels = {"sigma_max": first.sigma_max, "sigma_min": first.sigma_min}
    draws = sbi.annealed_langevin(score, num, key=key, num_levels=num_levels, **levels)
    return np.asarray(draws), float("nan")


def methods(n: int) -> dict[str, Callable[..., Any]]:
    """Of a case, a number of draws and a key: draws and the evidence ratio."""
    steps = max(400, 100 * n)
    return {
        "product, bridge": lambda *args: by_cloud(*args, steps, True),
        "product, plain path": lambda *args: by_cloud(*args, steps, False),
        "sum of scores": lambda *args: by_score(sbi.Sum, 1000, *args),
        "F-NPSE, Langevin": by_langevin,
        "GAUSS": lambda *args: by_score(sbi.GAUSS, 1000, *args),
        "JAC": lambda *args: by_score(sbi.JAC, 400, *args),
        "damping": lambda *args: by_score(sbi.Damped, 1000, *args),
    }


def profile(draws: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Quantiles along 200 directions, or along the only one: [2000, directions]."""
    size = draws.shape[1]
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(200, size)) if size > 1 else np.ones((1, 1))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    return np.quantile(draws / scale @ directions.T, (np.arange(2000) + 0.5) / 2000, axis=0)


class Truth:
    """Exact draws of a case, and Wasserstein-1 distances to them along directions."""

    def __init__(self, case: Case, num: int, scale: np.ndarray | None = None):
        draws = case.exact(50_000, 0)
        self.scale = draws.std(0) if scale is None else scale
        self.profile = profile(draws, self.scale)
        self.floors = [self.distances(case.exact(num, i)) for i in range(1, 21)]

    def distances(self, draws: np.ndarray) -> np.ndarray:
        """One of each direction, in units of `scale`."""
        return np.abs(profile(draws, self.scale) - self.profile).mean(0)

    def floor(self, summary: Callable[..., Any]) -> float:
        """What twenty sets of exact draws reach, by a summary over directions."""
        return float(np.mean([summary(one) for one in self.floors]))


@cache
def mixture_truth(size: int, n: int, seed: int, num: int) -> Truth:
    """In units of the posterior's standard deviations."""
    return Truth(mixture(size, n, seed), num)


@cache
def gaussian_truth(size: int, n: int, seed: int, num: int) -> Truth:
    """In units of the data; the same whatever `eps`."""
    case, s = gaussian(size, n, 0.0, seed)
    return Truth(case, num, 1 / s)


def measure(setting: Any, method: Callable[..., Any], num: int) -> dict[str, float]:
    """One data set, `size, n, seed`, by one method."""
    case, truth = mixture(*setting), mixture_truth(*setting, num)
    start = time.perf_counter()
    draws, ratio = method(case, num, jax.random.key(setting[-1]))
    seconds = time.perf_counter() - start
    return {
        "W1 / sd": float(truth.distances(draws).mean()),
        "floor": truth.floor(np.mean),
        "evidence error": abs(ratio - case.ratio),
        "seconds": seconds,
    }


def measure_gaussian(setting: Any, method: Callable[..., Any], num: int, seed: int) -> dict:
    """The largest distance, less its floor, in units of the data, for `size, n, eps`."""
    size, n, _ = setting
    case, truth = gaussian(*setting, seed)[0], gaussian_truth(size, n, seed, num)
    start = time.perf_counter()
    draws, _ = method(case, num, jax.random.key(seed))
    seconds = time.perf_counter() - start
    found = truth.distances(draws).max() - truth.floor(np.max)
    return {"max W1 - floor": float(found), "seconds": seconds}


def mixtures(options: Any, progress: Progress, toy: str, sizes: Any) -> dict[str, Any]:
    """All methods on all data sets of a mixture toy."""
    size, num = (1, 2048) if toy == "mixture-1d" else (5, 1024)
    found, rows = {}, []
    for n in sizes[: 2 if options.quick else None]:
        for name in options.methods:
            method = methods(n)[name]

            def one(seed: int, n: int = n, method: Any = method) -> dict[str, float]:
                return measure((size, n, seed), method, num)

            label = f"{toy}, n = {n}, {name}"
            results = [
                progress(f"{label}, {seed}", num, partial(one, seed))
                for seed in range(options.repeats)
            ]
            means = {k: float(np.mean([r[k] for r in results])) for k in results[0]}
            rows.append([f"{n}, {name}", *means.values()])
            found[label] = results
    show(f"{toy}, {options.repeats} data sets", ["n, method", *means], rows)
    return found


def gaussians(options: Any, progress: Progress) -> dict[str, Any]:
    """The Gaussian toy."""
    found, rows = {}, []
    published = ("product, bridge", "F-NPSE, Langevin", "GAUSS", "JAC")
    chosen = [name for name in published if name in options.methods]
    for size, eps in itertools.product((2, 10, 32), (0.0, 0.01, 0.1)):
        for n in (2, 8, 32, 90)[: 2 if options.quick else None]:
            row: list[Any] = [f"{size}, {eps:g}, {n}"]
            for name in chosen:
                setting, method = (size, n, eps), methods(4)[name]
                label = f"gaussian, {size}, {eps:g}, {n}, {name}"
                results = [
                    progress(
                        f"{label}, {seed}",
                        1000,
                        partial(measure_gaussian, setting, method, 1000, seed),
                    )
                    for seed in range(options.repeats)
                ]
                row.append(float(np.mean([r["max W1 - floor"] for r in results])))
                found[label] = results
            rows.append(row)
    show("Gaussian toy: largest W1 less its floor", ["size, eps, n", *chosen], rows)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "composed_scores")
    toys = ["mixture-1d", "mixture-5d", "gaussian"]
    parser.add_argument("--toy", nargs="+", choices=toys, default=toys)
    parser.add_argument("--methods", nargs="+", choices=list(methods(1)), default=list(methods(1)))
    parser.add_argument("--repeats", type=int, default=10, help="data sets of every kind")
    options = parser.parse_args()
    options.repeats = 1 if options.quick else options.repeats
    progress, found = Progress(options.output), {}
    if "mixture-1d" in options.toy:
        found |= mixtures(options, progress, "mixture-1d", (2, 4, 8, 16, 32))
    if "mixture-5d" in options.toy:
        found |= mixtures(options, progress, "mixture-5d", (2, 8))
    if "gaussian" in options.toy:
        found |= gaussians(options, progress)
    write(options.output, found)


if __name__ == "__main__":
    main()
