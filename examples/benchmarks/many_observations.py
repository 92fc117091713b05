"""Posteriors of up to 10,000 observations by mini-batches, with exact and with learned scores.

    python examples/benchmarks/many_observations.py [--quick] [--scores exact 10000 100000]

The flat Gaussian toy of Arruda et al. ("Compositional amortized inference", 2025): ten parameters,
prior `N(0, 0.1^2 I)`, observations `N(theta, 0.1^2 I)`, so that the posterior of `n` is known, of
variance `0.1^2 / (n + 1)`. Scores of single observations are exact, or those of `sbi.NPSE` trained
on as many simulations as is said; "kept" is the same network, kept though held-out data do not
tell it from the regression under it.

Ours is `sbi.compose` by 500 particles and 60 steps, 100 observations at each; damping with as large
mini-batches and `GAUSS`, which takes all observations, are reverse diffusions of 500 steps.
Standard deviations over the exact ones, averaged over parameters, and the root of the mean square
of the errors of means in exact standard deviations; `regression` is the same of the posterior that
the linear regression alone gives, in closed form: what a finite number of simulations costs. The
effective sample size is that of the last cloud. Memory is the peak of the process, so far.

CPU. A stopped program goes on where it was. Set `JAX_ENABLE_X64=1` for 10,000 observations: in
single precision the rounding of scores, `n` times, may hide the pull of the bridge, whose share
then falls below one, and 60 steps are too few.
"""

import math
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from common import Progress, arguments, show, write

from scoreprior import Moments, ScorePrior, sbi
from scoreprior import feynman_kac as fk
from scoreprior.denoise import AbstractDenoiser
from scoreprior.sample import Ancestral, LogGrid, sample

SIZE, SCALE = 10, 0.1
SIGMA_MIN, SIGMA_MAX = 3e-3, 10.0
NUM_PILOT, NUM_IN_BATCH = 64, 100
PRIOR = dist.Normal(jnp.zeros(SIZE), SCALE).to_event(1)


class Exact(AbstractDenoiser):
    """The denoiser of `z = theta / 0.1` given one observation: `N(x / 0.2, I / 2)`."""

    def __call__(self, x: Any, sigma: Any, context: Any = None) -> Any:
        center = context.x / (2 * SCALE)
        return center + (x - center) / (1 + 2 * sigma**2)


def exact_posterior() -> sbi.Posterior:
    """As a trained one is, with the denoiser in closed form."""
    parameters = sbi.Parameters.of(PRIOR)
    ones = jnp.ones(SIZE)
    standardise = sbi.Standardise(0 * ones, 0.15 * ones, -10 * ones, 10 * ones)
    return sbi.Posterior(
        parameters, Exact(), standardise, Moments(0 * ones, ones), SIGMA_MIN, SIGMA_MAX
    )


def train(num: int, num_steps: int, least_gain: float, folder: Path) -> sbi.Posterior:
    """`NPSE` on `num` simulations, of which at most 10,000 are held out."""
    key_theta, key_x, key_fit = jax.random.split(jax.random.key(num), 3)
    theta = SCALE * jax.random.normal(key_theta, (num, SIZE))
    x = theta + SCALE * jax.random.normal(key_x, (num, SIZE))
    folder.mkdir(parents=True, exist_ok=True)
    return sbi.NPSE(PRIOR, (theta, x), width=64, num_blocks=2).fit(
        key=key_fit,
        num_steps=num_steps,
        held_out=min(0.1, 10_000 / num),
        least_gain=least_gain,
        checkpoint=folder / f"many_observations_{num}_{num_steps}.safetensors",
        progress=False,
    )


def observe(n: int, seed: int) -> np.ndarray:
    """Observations [n, size] of one draw of the prior."""
    rng = np.random.default_rng(seed)
    return SCALE * (rng.normal(size=SIZE) + rng.normal(size=(n, SIZE)))


def compared(x: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> tuple[float, float]:
    """Of a posterior of `z`: mean ratio of standard deviations, and error of the mean."""
    root = math.sqrt(len(x) + 1)
    error = mean - x.sum(0) / SCALE / (len(x) + 1)
    return float(np.mean(sd) * root), float(np.sqrt(np.mean(error**2)) * root)


def by_regression(posterior: sbi.Posterior, x: np.ndarray) -> tuple[float, float]:
    """What the regression under the network gives by itself."""
    regression, n = posterior.denoiser.regression, len(x)
    c = (x - np.asarray(posterior.standardise.mean)) / np.asarray(posterior.standardise.scale)
    means = c @ np.asarray(regression.weights, float).T + np.asarray(regression.bias, float)
    precision = np.linalg.inv(np.asarray(regression.residual.covariance(), float))
    covariance = np.linalg.inv(n * precision - (n - 1) * np.eye(SIZE))
    mean = covariance @ (n * precision) @ means.mean(0)
    return compared(x, mean, np.sqrt(np.diag(covariance)))


@eqx.filter_jit
def run_cloud(chain: fk.Composed, num: int, key: Any) -> fk.FKState:
    """The last cloud."""
    return fk.run(chain.model(), fk.Resampling(), num, key)[0]


def by_cloud(laws: list[ScorePrior], prior: Any, num: int, key: Any) -> tuple[Any, ...]:
    """Mean, standard deviations and effective sample size of a weighted cloud."""
    batch_size = NUM_IN_BATCH if len(laws) > NUM_IN_BATCH else None
    chain = sbi.compose(laws, prior, batch_size=batch_size).composed(60, control=fk.NoControl())
    state = run_cloud(chain, num, key)
    weights = np.asarray(jax.nn.softmax(state.log_weights), float)
    z = np.asarray(state.particles, float)
    mean = weights @ z
    return mean, np.sqrt(weights @ (z - mean) ** 2), float(1 / np.sum(weights**2))


def by_score(kind: Any, laws: list[ScorePrior], prior: Any, num: int, key: Any) -> tuple[Any, ...]:
    """The same of the reverse diffusion along a composite score."""
    score = kind(sbi.compose(laws, prior, bridge=False))
    start = Moments.dense(jnp.zeros(SIZE), jnp.zeros((SIZE, SIZE)))
    sigmas = LogGrid(SIGMA_MIN, SIGMA_MAX)(500)
    z = np.asarray(sample(score, start, num, key=key, sigmas=sigmas, sampler=Ancestral()), float)
    return z.mean(0), z.std(0), float(num)


def damped(product: Any) -> sbi.Damped:
    """Damping to 0.01 with mini-batches."""
    size = min(NUM_IN_BATCH, product.num_observations)
    return sbi.Damped(product, batch_size=size)


METHODS = {
    "product": by_cloud,
    "damping": partial(by_score, damped),
    "GAUSS": partial(by_score, sbi.GAUSS),
}


def measure(posterior: sbi.Posterior, n: int, method: str, num: int) -> dict[str, float]:
    """One data set."""
    x = observe(n, 0)
    start = time.perf_counter()
    laws = posterior.condition_all(x, num_pilot=NUM_PILOT)
    prior = posterior.parameters.law
    mean, sd, ess = METHODS[method](laws, prior, num, jax.random.key(1))
    seconds = time.perf_counter() - start
    ratio, error = compared(x, mean, sd)
    found = {"sd ratio": ratio, "mean error": error, "ESS": ess, "seconds": seconds}
    found["GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if not isinstance(posterior.denoiser, Exact):
        found["regression sd"], found["regression error"] = by_regression(posterior, x)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "many_observations")
    parser.add_argument(
        "--scores", nargs="+", default=["exact", "10000", "100000", "1000000", "100000 kept"]
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 100, 1000, 10_000])
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--steps", type=int, default=3000, help="of training")
    options = parser.parse_args()
    if options.quick:
        options.scores, options.sizes = ["exact", "10000"], [10, 100]
        options.draws, options.steps = 100, 500
    settings, progress = (options.draws, options.steps), Progress(options.output)
    found: dict[str, Any] = {}
    rows: list[list[Any]] = []
    columns: list[str] = []
    for scores in options.scores:
        num, _, kept = scores.partition(" ")
        made: list[sbi.Posterior] = []

        def posterior(num: str = num, kept: str = kept, made: list[Any] = made) -> Any:
            if not made:
                gain = -math.inf if kept else 2.0
                folder = options.output.parent
                is_exact = num == "exact"
                made.append(
                    exact_posterior() if is_exact else train(int(num), options.steps, gain, folder)
                )
            return made[0]

        for n in options.sizes:
            for method in options.methods:
                if method == "GAUSS" and n > 100:  # it looks at all observations at every step
                    continue
                label = f"{scores}, n = {n}, {method}"

                def one(p: Any = posterior, n: int = n, method: str = method) -> dict[str, float]:
                    return measure(p(), n, method, options.draws)

                found[label] = progress(label, settings, one)
                columns = max(columns, list(found[label]), key=len)
                rows.append([label, *found[label].values()])
    rows = [row + [""] * (len(columns) + 1 - len(row)) for row in rows]
    show("Flat Gaussian toy, ten parameters", ["scores, n, method", *columns], rows)
    write(options.output, found)


if __name__ == "__main__":
    main()
