"""Powers and products of mixtures by Feynman-Kac correctors, against closed forms.

    python examples/benchmarks/compositions.py [--quick] [--problems annealing GMM-40 ...]

The log normaliser and the draws of a `Composition` by eight schemes: with `VarianceControl` and
without control, where `NoControl` with `Euler` is the plain corrector of the literature; where
`EnergyRatio` weighs by the denoisers' energies; and with moves of tempered noise. Problems:
laws on the line with 2,048 particles (truth by quadrature of the noised densities); the cube of 40
narrow modes in the plane, 2,000 particles; the square of four modes in 30 dimensions, 1,024
particles (truths by products of components). Mean error over independent runs with its standard
error, their standard deviation, the total variation of the draws of one run (over 35 x 35 bins, of
the masses of modes) beside that of as many exact draws, the least effective sample size, and
seconds per run, compilation apart. Settings are fixed in advance. CPU, double precision, about 15
minutes; a stopped program goes on where it was.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from common import Progress, arguments, show, write
from scipy.special import logsumexp
from scipy.stats import norm

import scoreprior as sp
from scoreprior.denoise import GaussianMixture
from scoreprior.feynman_kac import (
    EnergyRatio,
    Euler,
    KernelRatio,
    NoControl,
    Resampling,
    TargetScore,
    TemperedNoise,
    Trapezoid,
    VarianceControl,
    run,
    systematic,
)

SCHEMES = {
    "control, trapezoid": (VarianceControl(), Trapezoid(), TargetScore()),
    "control, kernel ratio": (VarianceControl(), KernelRatio(), TargetScore()),
    "Euler": (NoControl(), Euler(), TargetScore()),
    "kernel ratio": (NoControl(), KernelRatio(), TargetScore()),
    "control, energy ratio": (VarianceControl(), EnergyRatio(), TargetScore()),
    "energy ratio": (NoControl(), EnergyRatio(), TargetScore()),
    "control, tempered noise": (VarianceControl(), Trapezoid(), TemperedNoise()),
    "Euler, tempered noise": (NoControl(), Euler(), TemperedNoise()),
}
COLUMNS = ["log Z error", "its se", "sd", "TV", "TV floor", "least ESS", "seconds"]


class Mixture(NamedTuple):
    """Isotropic components: weights [m], means [m, d], standard deviations [m]."""

    weights: np.ndarray
    means: np.ndarray
    sds: np.ndarray

    def prior(self, sigma_min: float, sigma_max: float | None = None) -> sp.ScorePrior:
        law = GaussianMixture.diagonal(self.weights, self.means, (self.sds**2)[:, None])
        flow = sp.Flow(law, law.moments(), sigma_min=sigma_min, sigma_max=sigma_max)
        return sp.ScorePrior(flow)

    def power(self, beta: int, sigma_min: float) -> "Mixture":
        """The law with noise `sigma_min`, to a power; the sum of its weights is the normaliser."""
        variances, d = self.sds**2 + sigma_min**2, self.means.shape[1]
        chosen = itertools.combinations_with_replacement(range(len(variances)), beta)
        rows = np.array(list(chosen))
        counts = [math.prod(math.factorial(n) for n in Counter(row).values()) for row in rows]
        precisions, means = 1 / variances[rows], self.means[rows]
        total = precisions.sum(1)
        mean = (precisions[..., None] * means).sum(1) / total[:, None]
        log_weights = (
            math.log(math.factorial(beta))
            - np.log(counts)
            + (np.log(self.weights) - d / 2 * np.log(2 * np.pi * variances))[rows].sum(1)
            - (precisions * ((means - mean[:, None]) ** 2).sum(2)).sum(1) / 2
            + d / 2 * np.log(2 * np.pi / total)
        )
        return Mixture(np.exp(log_weights), mean, total**-0.5)

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        rows = rng.choice(len(self.weights), size, p=self.weights / self.weights.sum())
        noise = rng.standard_normal((size, self.means.shape[1]))
        return self.means[rows] + self.sds[rows, None] * noise


class Case(NamedTuple):
    """A composition, its log normaliser, and the masses of bins or modes."""

    law: sp.Composition
    log_normaliser: float
    masses: Callable[[np.ndarray], np.ndarray]
    exact: np.ndarray
    floor: float
    num_particles: int
    steps: tuple[int, ...]
    repeats: int


def on_the_line(*mixtures: tuple[float, Mixture]) -> Case:
    """One dimension: total variation over 50 bins, exact by quadrature."""
    sigma_min = 0.01
    law = sp.compose({m.prior(sigma_min): beta for beta, m in mixtures})
    grid = np.linspace(-12, 12, 500_001)
    log_p = np.zeros_like(grid)
    for beta, (weights, means, sds) in mixtures:
        terms = zip(weights, means[:, 0], np.hypot(sds, sigma_min), strict=True)
        log_p += beta * logsumexp([np.log(w) + norm.logpdf(grid, m, s) for w, m, s in terms], 0)
    log_z = float(logsumexp(log_p) + math.log(grid[1] - grid[0]))
    edges = np.linspace(-5, 5, 51)

    def masses(x: np.ndarray) -> np.ndarray:
        return np.histogram(x[:, 0], edges)[0] / len(x)

    density = np.exp(log_p - logsumexp(log_p))
    exact = np.histogram(grid, edges, weights=density)[0]
    rng = np.random.default_rng(0)
    draws = [rng.choice(grid, (2048, 1), p=density) for _ in range(20)]
    floor = _floor(masses, exact, draws)
    return Case(law, log_z, masses, exact, floor, 2048, (100, 200, 500), 24)


def gmm40() -> Case:
    """The annealing benchmark of Skreta et al. 2025, with means drawn by JAX."""
    means = (np.asarray(jax.random.uniform(jax.random.key(0), (40, 2))) - 0.5) * 80 / 50
    mixture = Mixture(np.full(40, 1 / 40), means, np.full(40, math.log1p(math.exp(2)) / 50))
    prior = mixture.prior(0.01, 10.0)

    def masses(x: np.ndarray) -> np.ndarray:
        bins = np.histogram2d(x[:, 0], x[:, 1], 35, [[-1.15, 1.15]] * 2)[0]
        return bins / len(x)

    return _power(mixture, prior, 3, masses, 2000, (100, 300, 1000), 8)


def thirty_dimensions() -> Case:
    """Four modes of unequal width, whose square has nearly all mass in the narrowest."""
    means = np.asarray(jax.random.normal(jax.random.key(3), (4, 30)))
    mixture = Mixture(np.array([0.4, 0.3, 0.2, 0.1]), means, np.array([0.5, 0.7, 0.4, 0.6]))
    prior = mixture.prior(0.02, 30.0)

    def masses(x: np.ndarray) -> np.ndarray:
        nearest = ((x[:, None] - means) ** 2).sum(2).argmin(1)
        return np.bincount(nearest, minlength=4) / len(x)

    return _power(mixture, prior, 2, masses, 1024, (100, 200, 500), 8)


def _power(
    mixture: Mixture,
    prior: sp.ScorePrior,
    beta: int,
    masses: Callable[[np.ndarray], np.ndarray],
    num_particles: int,
    steps: tuple[int, ...],
    repeats: int,
) -> Case:
    power, rng = mixture.power(beta, prior.sigma_min), np.random.default_rng(0)
    exact = masses(power.draw(rng, 1_000_000))
    floor = _floor(masses, exact, [power.draw(rng, num_particles) for _ in range(20)])
    log_z = math.log(power.weights.sum())
    law = sp.compose({prior: float(beta)})
    return Case(law, log_z, masses, exact, floor, num_particles, steps, repeats)


def _floor(masses: Callable[..., np.ndarray], exact: np.ndarray, draws: list[np.ndarray]) -> float:
    return float(np.mean([np.abs(masses(x) - exact).sum() / 2 for x in draws]))


def problems() -> dict[str, Callable[[], Case]]:
    """Cases by name."""

    def line(weights: list[float], means: list[float], sds: list[float]) -> Mixture:
        return Mixture(np.array(weights), np.array(means)[:, None], np.array(sds))

    q = line([0.3, 0.2, 0.5], [-2, 0.5, 2], [0.4, 0.3, 0.7])
    a = line([0.5, 0.5], [-1.5, 1.5], [0.9, 0.9])
    b = line([0.3, 0.7], [-1.2, 1.6], [0.5, 0.6])
    return {
        "annealing, 3": lambda: on_the_line((3.0, q)),
        "product": lambda: on_the_line((1.0, a), (1.0, b)),
        "geometric mean": lambda: on_the_line((0.5, a), (0.5, b)),
        "guidance, -1 and 2": lambda: on_the_line((-1.0, a), (2.0, b)),
        "GMM-40, 3": gmm40,
        "30 dimensions, 2": thirty_dimensions,
    }


def measure(case: Case, scheme: str, num_steps: int, repeats: int) -> dict[str, Any]:
    """Independent runs of one scheme."""
    control, weight, noise = SCHEMES[scheme]
    composed = case.law.composed(num_steps, weight=weight, control=control, noise=noise)

    @eqx.filter_jit
    def one(composed: Any, key: jax.Array) -> Any:
        key_run, key_draw = jax.random.split(key)
        state, info = run(composed.model(), Resampling(), case.num_particles, key_run)
        rows = systematic(key_draw, jax.nn.softmax(state.log_weights), case.num_particles)
        return state.log_evidence, state.particles[rows], info.ess.min()

    jax.block_until_ready(one(composed, jax.random.key(repeats)))
    start = time.perf_counter()
    runs = [jax.block_until_ready(one(composed, jax.random.key(i))) for i in range(repeats)]
    seconds = (time.perf_counter() - start) / repeats
    errors = np.array([float(log_z) for log_z, _, _ in runs]) - case.log_normaliser
    distances = [np.abs(case.masses(np.asarray(x)) - case.exact).sum() / 2 for _, x, _ in runs]
    return {
        "log Z error": float(errors.mean()),
        "its se": float(errors.std(ddof=1) / math.sqrt(repeats)),
        "sd": float(errors.std(ddof=1)),
        "TV": float(np.mean(distances)),
        "TV floor": case.floor,
        "least ESS": float(min(size for _, _, size in runs)),
        "seconds": seconds,
    }


def main() -> None:
    """Measure, print and write."""
    jax.config.update("jax_enable_x64", True)
    parser = arguments(__doc__, "compositions")
    parser.add_argument("--problems", nargs="+", default=list(problems()), help="some of them")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    options = parser.parse_args()
    progress, results = Progress(options.output), {}
    for name in options.problems:
        case, rows = problems()[name](), []
        steps = case.steps[:2] if options.quick else case.steps
        repeats = 4 if options.quick else case.repeats
        for scheme, num_steps in itertools.product(options.schemes, steps):
            result = progress(
                f"{name}, {scheme}, {num_steps}",
                (case.num_particles, repeats),
                partial(measure, case, scheme, num_steps, repeats),
            )
            rows.append([scheme, num_steps, *(result[column] for column in COLUMNS)])
        title = f"{name}: log Z = {case.log_normaliser:.4f}, {repeats} runs"
        show(title, ["scheme", "steps", *COLUMNS], rows)
        results[name] = {"log Z": case.log_normaliser, "rows": rows}
    write(options.output, {"columns": ["scheme", "steps", *COLUMNS], "problems": results})


if __name__ == "__main__":
    main()
