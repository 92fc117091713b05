"""Posteriors of Gaussian mixtures under linear data, in closed form, and distances to them.

Components share one isotropic covariance, so that the posterior under data
`y = A x + N(0, sigma_y^2 I)` is a mixture with one covariance. It is computed here in double
precision, by formulas of its own.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from scoreprior import FixedGrid, Flow, Moments, Problem, ScorePrior
from scoreprior.denoise import GaussianMixture
from scoreprior.flow import ArctanTime


class Case(NamedTuple):
    """Components `N(means[k], variance I)` with `weights`, and `y` = A x + N(0, sigma_y^2 I)."""

    weights: np.ndarray
    means: np.ndarray
    A: np.ndarray
    y: np.ndarray
    sigma_y: float
    variance: float = 1.0


class Posterior(NamedTuple):
    """A mixture of Gaussians `N(means, root root')`, and the log evidence."""

    weights: np.ndarray
    means: np.ndarray
    root: np.ndarray
    log_evidence: float


def grid(size: int) -> np.ndarray:
    """25 means on a grid of spacing 8, repeated along `size` coordinates."""
    means = [(-8.0 * i, -8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
    return np.tile(means, size // 2)


def draw_case(
    size: int, num_data: int, sigma_y: float | None, seed: int, weights: np.ndarray | None = None
) -> Case:
    """A random operator `U diag(s) V'`, `s` sorted uniforms, and data simulated with it.

    Weights are equal by default, and `sigma_y` uniform up to the largest of `s`.
    """
    rng = np.random.default_rng(seed)
    means = grid(size)
    weights = np.full(25, 1 / 25) if weights is None else weights
    u, _, v = np.linalg.svd(rng.standard_normal((num_data, size)), full_matrices=False)
    s = np.sort(rng.uniform(size=num_data))[::-1]
    noise = rng.uniform() * s[0] if sigma_y is None else sigma_y
    A = u @ np.diag(s) @ v
    x = means[rng.choice(25, p=weights)] + rng.standard_normal(size)
    return Case(weights, means, A, A @ x + noise * rng.standard_normal(num_data), noise)


def suite_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which problems of `suite` to solve."""
    parser.add_argument("--dimension", type=int, default=8, help="an even number")
    parser.add_argument("--repeats", type=int, default=8, help="problems of every kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first repeat")
    parser.add_argument("--random", action="store_true", help="random weights and noise")
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="levels of the noise"
    )


def suite_weights(options: argparse.Namespace) -> np.ndarray:
    """Weights [25] of the modes, the same for all problems."""
    weights = np.random.default_rng(27).standard_normal(25) ** 2 if options.random else np.ones(25)
    return weights / weights.sum()


class Numbered(NamedTuple):
    """A problem of a suite, and how it was drawn; a random `sigma_y` is `None`."""

    case: Case
    num_data: int
    sigma_y: float | None
    seed: int

    @property
    def kind(self) -> str:
        """Problems of one kind differ by the seed alone."""
        return f"{self.num_data} / {self.sigma_y or 'random'}"


def suite(options: argparse.Namespace) -> Iterator[Numbered]:
    """1, 2 and 4 data, at three levels of noise or random ones; of each, as many as are asked."""
    weights = suite_weights(options)
    levels = (None,) if options.random else options.noise
    repeats = range(options.first, options.first + (1 if options.quick else options.repeats))
    for num_data, sigma_y, seed in itertools.product((1, 2, 4), levels, repeats):
        case = draw_case(options.dimension, num_data, sigma_y, seed, weights)
        yield Numbered(case, num_data, sigma_y, seed)


def solve(case: Case) -> Posterior:
    """The posterior, by the formulas of a Gaussian for every component."""
    covariance = case.variance * case.A @ case.A.T + case.sigma_y**2 * np.eye(len(case.y))
    gain = case.variance * np.linalg.solve(covariance, case.A).T
    residuals = case.y - case.means @ case.A.T
    means = case.means + residuals @ gain.T
    log_joint = (
        np.log(case.weights)
        - 0.5 * np.einsum("ki,ki->k", residuals, np.linalg.solve(covariance, residuals.T).T)
        - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    log_evidence = np.logaddexp.reduce(log_joint)
    # (I - K A) v, as a sum of squares, which rounding leaves positive.
    shrink = np.eye(len(gain)) - gain @ case.A
    root = np.linalg.cholesky(case.variance * shrink @ shrink.T + case.sigma_y**2 * gain @ gain.T)
    return Posterior(np.exp(log_joint - log_evidence), means, root, float(log_evidence))


def sample(posterior: Posterior, num_draws: int, seed: int) -> np.ndarray:
    """Exact draws [num_draws, d]."""
    rng = np.random.default_rng(1000 + seed)
    modes = rng.choice(len(posterior.weights), size=num_draws, p=posterior.weights)
    noise = rng.standard_normal((num_draws, len(posterior.root)))
    return posterior.means[modes] + noise @ posterior.root.T


def mass_error(posterior: Posterior, x: np.ndarray) -> float:
    """Total variation between the masses of the modes and the shares of draws [n, d] in them."""
    white, centres = (np.linalg.solve(posterior.root, z.T).T for z in (x, posterior.means))
    distances = ((white[:, None] - centres[None]) ** 2).sum(-1)
    logits = np.log(np.maximum(posterior.weights, 1e-300)) - 0.5 * distances
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return float(0.5 * np.abs(shares.mean(0) - posterior.weights).sum())


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, num_slices: int = 1000) -> float:
    """Mean over random directions of the 1-D Wasserstein distance of two sets [n, d]."""
    return float(_by_slice(a, b, num_slices, 1).mean())


def max_sliced_wasserstein(a: np.ndarray, b: np.ndarray, num_slices: int = 100) -> float:
    """Largest over random directions of the 1-D 2-Wasserstein distance of [n, d] and [k n, d]."""
    return float(np.sqrt(_by_slice(np.repeat(a, len(b) // len(a), 0), b, num_slices, 2).max()))


def _by_slice(a: np.ndarray, b: np.ndarray, num_slices: int, power: int) -> np.ndarray:
    slices = np.random.default_rng(0).standard_normal((a.shape[1], num_slices))
    slices /= np.linalg.norm(slices, axis=0)
    return np.mean(np.abs(np.sort(a @ slices, 0) - np.sort(b @ slices, 0)) ** power, 0)


def problems(
    means: np.ndarray,
    weights: np.ndarray,
    variance: float = 1.0,
    watch: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Callable[[Case], Problem]:
    """A function from a `Case` with this mixture to its `Problem`; programs are compiled once.

    `watch` is an identity through which the model passes `x`.
    """
    sigma_min = 0.1 * np.sqrt(variance)
    clean = GaussianMixture.diagonal(
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(means, jnp.float32),
        float(variance - sigma_min**2),
    )
    # Steps are spent where modes separate, at a quarter of their distance.
    distances = np.linalg.norm(means[:, None] - means[None], axis=-1)
    solver = FixedGrid(12, ArctanTime(float(distances[distances > 0].min()) / 4))
    mean = weights @ means
    offsets = np.sqrt(weights)[:, None] * (means - mean)
    _, values, rows = np.linalg.svd(offsets, full_matrices=False)
    factor = (values[:, None] * rows)[values > 1e-6 * values.max()].T
    moments = Moments.low_rank(
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(factor, jnp.float32),
        float(variance - sigma_min**2),
    )
    prior = ScorePrior(Flow(clean, moments, sigma_min=float(sigma_min), solver=solver))

    def model(A, y, sigma_y):
        x = watch(numpyro.sample("x", prior))
        numpyro.sample("y", dist.Normal(A @ x, sigma_y).to_event(1), obs=y)

    first: dict[int, Problem] = {}

    def problem(case: Case) -> Problem:
        data = [jnp.asarray(value, jnp.float32) for value in (case.A, case.y, case.sigma_y)]
        first.setdefault(len(case.y), Problem.from_model(model, *data))
        return first[len(case.y)].with_data(*data)

    return problem
