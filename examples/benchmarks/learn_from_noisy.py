"""Digits priors learned from noisy or incomplete images only, against one learned from clean ones.

The 8x8 digits of scikit-learn, dequantised once, 1,437 for training and 180 to stop training by,
are seen in white noise at a signal-to-noise ratio of 10 or 0 dB, the signal being the variance of
pixels about the mean image, or through random masks that hide half of the pixels, in noise of
standard deviation 0.5. What is learned from them is told by 180 clean test images, and 360 clean
images that were not trained on:

- root-mean-square error per pixel of denoising test images, at several noise levels;
- sliced Wasserstein distance of 360 draws from the 360 images, the mean over four sets of draws,
  and beside it that of 360 clean training images.

Networks have the moments of the likeliest Gaussian, so that an untrained one is the Gaussian prior.
With isotropic ones, EM forgot the covariance of the first draws faster than it learned the rest.

    python examples/benchmarks/learn_from_noisy.py --cases noise-10 --methods em

A prior is learned in two to ten minutes on one core; a run that was stopped goes on.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import Progress, arguments, show, write
from mixtures import sliced_wasserstein
from sklearn.datasets import load_digits

from scoreprior import nn
from scoreprior.denoise import AbstractDenoiser, Gaussian, Network
from scoreprior.gaussian import Dense, Isotropic, Moments
from scoreprior.guide import MMPS
from scoreprior.io import load
from scoreprior.learn import EM, GuidedDraws, Measurements, Train, fit_gaussian
from scoreprior.sample import DPMSolver, LogGrid, sample
from scoreprior.train import (
    Ambient,
    DenoisingLoss,
    LogUniform,
    Residual,
    SUREScore,
    adamw,
    fit,
)

SIGMA_MIN, SIGMA_MAX = 0.2, 100.0
LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)
SLIGHT = 0.5
"""Standard deviation of the noise of masked images."""


class Budget(NamedTuple):
    """Steps of training, of which EM makes `num_rounds` equal parts."""

    num_steps: int = 3000
    num_rounds: int = 6
    num_levels: int = 30
    iterations: int = 2


class Case(NamedTuple):
    """Clean images, and how the training and validation images are seen."""

    train: jax.Array
    validation: jax.Array
    test: jax.Array
    seen: Measurements
    seen_validation: Measurements
    level: float | None  # of the white noise, where all is seen


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dequantised images for training, validation and test."""
    rng = np.random.default_rng(0)
    images = load_digits().images.astype(np.float32)
    images = images[rng.permutation(len(images))]
    images = images + rng.uniform(size=images.shape).astype(np.float32)
    train, validation, test = np.split(images, [1437, 1617])
    return train, validation, test


def make(name: str) -> Case:
    """The images as the case `name` has them."""
    train, validation, test = digits()
    rng = np.random.default_rng(1)
    signal = float(train.var(0).mean())
    level = {"noise-10": (signal / 10) ** 0.5, "noise-0": signal**0.5}.get(name)

    def see(images: np.ndarray) -> Measurements:
        noise = rng.standard_normal(images.shape).astype(np.float32)
        kept = rng.uniform(size=images.shape) < (1.0 if level else 0.5)
        spread = level or SLIGHT
        return Measurements(images + spread * noise, spread**2, present=kept)

    parts = map(jnp.asarray, (train, validation, test))
    return Case(*parts, see(train), see(validation), level)


def network(moments: Moments) -> Network:
    """An untrained network."""
    net = nn.ResidualMLP(
        (8, 8), width=128, num_blocks=2, embedding_size=32, dropout=0.1, key=jax.random.key(0)
    )
    return Network(net, moments)


def noise_loss(moments: Moments) -> DenoisingLoss:
    """The usual loss."""
    return DenoisingLoss(LogUniform(SIGMA_MIN, SIGMA_MAX), Residual(moments))


def trained(
    moments: Moments, data: jax.Array, held_out: jax.Array, loss: Any, budget: Budget
) -> AbstractDenoiser:
    """A network by `fit`."""
    return fit(
        network(moments),
        data,
        loss,
        key=jax.random.key(1),
        num_steps=budget.num_steps,
        held_out=held_out,
        optimiser=adamw(budget.num_steps, weight_decay=0.3),
        progress=False,
    ).denoiser


def clean(case: Case, budget: Budget) -> AbstractDenoiser:
    """Clean images."""
    moments = Moments.fit(case.train, Dense())
    return trained(moments, case.train, case.validation, noise_loss(moments), budget)


def bundled(case: Case, budget: Budget) -> AbstractDenoiser:
    """The bundled prior, of the same clean images and ten times as many steps."""
    return load("digits").flow.denoiser


def as_if_clean(case: Case, budget: Budget) -> AbstractDenoiser:
    """The images as seen, with hidden pixels zero."""
    moments = Moments.fit(case.seen.data, Dense())
    held_out = case.seen_validation.data
    return trained(moments, case.seen.data, held_out, noise_loss(moments), budget)


def likeliest(case: Case) -> Moments:
    """Moments of the likeliest Gaussian."""
    return fit_gaussian(case.seen, Dense(0.0), num_steps=30).moments


def gaussian(case: Case, budget: Budget) -> AbstractDenoiser:
    """The likeliest Gaussian."""
    return Gaussian(likeliest(case))


def em(case: Case, budget: Budget) -> AbstractDenoiser:
    """From that Gaussian by EM."""
    moments = likeliest(case)
    steps = budget.num_steps // budget.num_rounds
    levels = LogGrid(SIGMA_MIN / 2, SIGMA_MAX)(budget.num_levels).astype(jnp.float32)
    learned = EM(
        GuidedDraws(moments, levels, MMPS(budget.iterations)),
        Train(noise_loss(moments), steps, optimiser=adamw(steps, weight_decay=0.3)),
        budget.num_rounds,
    ).run(
        network(moments),
        case.seen,
        key=jax.random.key(1),
        held_out=case.seen_validation,
        progress=False,
    )
    for name, values in learned.history._asdict().items():
        print(name, np.round(values, 4).tolist(), flush=True)
    return learned.denoiser


def ambient(case: Case, budget: Budget) -> AbstractDenoiser:
    """Exact above the noise of the images, and what the network makes of it below."""
    assert case.level is not None
    moments = likeliest(case)
    noisy = Moments(moments.mean, moments.eigenvalues + case.level**2, moments.basis)
    loss = Ambient(noise_loss(noisy), case.level)
    return trained(moments, case.seen.data, case.seen_validation.data, loss, budget)


def sure_score(case: Case, budget: Budget) -> AbstractDenoiser:
    """Stein's risk, and posterior means for clean images."""
    assert case.level is not None
    moments = likeliest(case)
    loss = SUREScore(case.level, noise_loss(moments))
    return trained(moments, case.seen.data, case.seen_validation.data, loss, budget)


METHODS: dict[str, Callable[[Case, Budget], AbstractDenoiser]] = {
    "bundled": bundled,
    "clean": clean,
    "as-if-clean": as_if_clean,
    "gaussian": gaussian,
    "em": em,
    "ambient": ambient,
    "sure-score": sure_score,
}
CASES = ("noise-10", "noise-0", "mask")
ANY_CASE = ("bundled", "clean")
NOISE_ONLY = ("ambient", "sure-score")


def measure(case: Case, method: str, budget: Budget) -> dict[str, float]:
    """Learn a prior and say what it is worth."""
    begin = time.perf_counter()
    denoiser = METHODS[method](case, budget)
    found = {"seconds": time.perf_counter() - begin}
    for sigma in LEVELS:
        noise = jax.random.normal(jax.random.key(2), (8, *case.test.shape))
        error = jax.jit(
            jax.vmap(jax.vmap(lambda n, x, s=sigma: denoiser(x + s * n, s) - x), (0, None))
        )(noise, case.test)
        found[f"error at {sigma:g}"] = float(jnp.sqrt(jnp.mean(error**2)))
    moments = Moments.fit(case.train, Isotropic())
    images = np.concatenate([case.validation, case.test]).reshape(-1, 64)
    num, distances = len(images), []
    for seed in range(4):
        x = sample(
            denoiser,
            moments,
            num,
            key=jax.random.key(10 + seed),
            sigmas=LogGrid(SIGMA_MIN, SIGMA_MAX)(60),
            sampler=DPMSolver(),
        )
        distances.append(sliced_wasserstein(np.asarray(x).reshape(num, 64), images))
    found["sliced Wasserstein"] = float(np.mean(distances))
    parts = np.asarray(case.train).reshape(-1, 64)[: 3 * num].reshape(3, num, 64)
    found["of clean images"] = float(np.mean([sliced_wasserstein(p, images) for p in parts]))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "learn_from_noisy")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args()
    budget = Budget(200, 2, 10) if options.quick else Budget()
    progress, found = Progress(options.output), {}
    for name in options.cases:
        case, found[name] = make(name), {}
        for method in options.methods:
            if name == "mask" and method in NOISE_ONLY:
                continue
            settings = (budget, "any") if method in ANY_CASE else (budget, name)
            label = method if method in ANY_CASE else f"{name}, {method}"
            found[name][method] = progress(label, settings, partial(measure, case, method, budget))
            jax.clear_caches()
        columns = list(next(iter(found[name].values()), {}))
        rows = [[method, *result.values()] for method, result in found[name].items()]
        show(name, ["learned by", *columns], rows)
    write(options.output, found)


if __name__ == "__main__":
    main()
