"""Coverage, errors and scores of posteriors of held-out digits, seen by three instruments.

    python examples/benchmarks/imaging.py [--quick] [--digits 100] [--tempered 17] [--nuts 3]
        [--methods TemperedSMC NUTS ...] [--from-prior] [--table]

Instruments: `blur`, a Gaussian of one pixel, 64 numbers; `mask`, 32 pixels at random; `Fourier`, 17
of the 34 frequencies of a real image. Each with noise of one and of four grey levels, of 16. A
quarter of the numbers is held out. Truths are held-out digits with the noise of `sigma_min`, which
is what the prior is the law of; with --from-prior they are draws of the prior itself, of which an
exact method covers what it says, however well the prior was learned.

Measured of every posterior, from its draws: how often central intervals of 50 % and 90 % hold a
pixel, and how often the total brightness; PSNR of the mean (peak 16); CRPS of a pixel and energy
score of the image, in grey levels; and the log density of the numbers held out, each given the
numbers seen, nats per number. Pixels of an image depend on one another, so standard errors are over
images. Quantiles are placed so that draws from the posterior cover as they say, however few they
are (`weibull`). A method is `off` where coverage is more than five standard errors away.

Methods: `TemperedSMC` and `NUTS`, and `FeynmanKac`, have the posterior of the learned prior.
`Guided` and `DAPS` approximate it. `prior` has that prior and no data. `Gaussian` has a prior with
the moments of the training digits instead, and is exact; `total variation` has
`exp(-strength sum sqrt(|grad x|^2 + 0.01))` on pixels from -1 to 18, by NUTS of blackjax. What has
a setting, takes the one that does best on other digits: `DPS` and `DiffPIR` by the energy score,
total variation by the held-out log density.

Instruments and data are inputs of compiled programs, one for every method. A stopped program goes
on where it was; `--table` computes nothing. Single precision, CPU.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import Progress, arguments, digits_flow, held_out_digits, show, with_solver, write
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.datasets import load_digits

import scoreprior as sp
from scoreprior import check
from scoreprior.flow import FixedGrid, Multistep
from scoreprior.guide import DPS, MMPS, DiffPIR
from scoreprior.operators import (
    AbstractLinearOperator,
    FourierSampling,
    GaussianBlur,
    Mask,
    RealImag,
    Zero,
)
from scoreprior.smc import HMCMoves

SHAPE, PEAK = (8, 8), 16.0
NOISES = (1.0, 4.0)
LOWEST, HIGHEST = -1.0, 18.0
"""Pixels under total variation are within: 0 to 17 grey levels, and the noise of `sigma_min`."""
NUM_OTHERS = 4
"""Digits that settings are chosen on, the last of the held-out ones."""


class Instrument(NamedTuple):
    """What is measured and given to the posterior, and what is measured and held out."""

    seen: AbstractLinearOperator
    held_out: AbstractLinearOperator


def blur() -> Instrument:
    """All pixels through a Gaussian of one pixel; black outside the image."""
    operator = GaussianBlur(jnp.float32(1.0), SHAPE, Zero())
    seen = np.random.default_rng(0).permutation(64).reshape(SHAPE) >= 16
    return Instrument(Mask(seen) @ operator, Mask(~seen) @ operator)


def mask() -> Instrument:
    """32 pixels: 24 and 8."""
    order = np.random.default_rng(1).permutation(64).reshape(SHAPE)
    return Instrument(Mask(order < 24), Mask((order >= 24) & (order < 32)))


def fourier() -> Instrument:
    """The mean, and 12 and 4 other frequencies of the 30 that have a conjugate."""
    row, col = np.indices(SHAPE).reshape(2, -1)
    conjugate = (-row % 8) * 8 + -col % 8
    (own,) = np.nonzero(np.arange(64) < conjugate)
    own = np.random.default_rng(2).permutation(own)

    def take(chosen: np.ndarray) -> AbstractLinearOperator:
        frequencies = np.zeros(64, bool)
        frequencies[chosen] = True
        return RealImag(FourierSampling(frequencies.reshape(SHAPE)))

    return Instrument(take(np.append(own[:12], 0)), take(own[12:16]))


INSTRUMENTS = {"blur": blur, "mask": mask, "Fourier": fourier}


class Data(NamedTuple):
    """A digit, what is seen of it and what is held out, flattened."""

    truth: np.ndarray
    y: np.ndarray
    y_held_out: np.ndarray


@cache
def digits() -> np.ndarray:
    """All held-out digits."""
    return np.asarray(held_out_digits(digits_flow(jnp.float32), 10**6))


@cache
def matrices(name: str) -> tuple[np.ndarray, np.ndarray]:
    """What is seen and what is held out, on flattened images.

    Of 64 pixels a matrix is faster than a transform inside a denoiser's derivative.
    """
    basis = jnp.eye(64).reshape(64, *SHAPE)
    seen, held_out = (
        np.asarray(jax.vmap(operator)(basis), float).reshape(64, -1).T
        for operator in INSTRUMENTS[name]()
    )
    return seen, held_out


@cache
def prior_draws(num_draws: int, seed: int) -> np.ndarray:
    """Draws of the prior [n, 8, 8], by the solver of its posteriors."""
    keys = jax.random.split(jax.random.key(seed), num_draws)
    return np.asarray(jax.lax.map(prior().sample, keys, batch_size=100), float)


def observe(name: str, noise: float, index: int, *, from_prior: bool = False) -> Data:
    """Data of held-out digit, or draw of the prior, `index`."""
    truth = (prior_draws(100, 1) if from_prior else digits())[index].astype(float).ravel()
    rng = np.random.default_rng([list(INSTRUMENTS).index(name), int(10 * noise), index])
    y, y_held_out = (A @ truth + noise * rng.standard_normal(len(A)) for A in matrices(name))
    return Data(truth, y, y_held_out)


def padded(name: str, data: Data) -> tuple[jax.Array, jax.Array]:
    """The matrix and the data, with zeros to the size of the largest: one shape, one program."""
    (A, _), size = matrices(name), max(len(matrices(each)[0]) for each in INSTRUMENTS)
    A = np.pad(A, ((0, size - len(A)), (0, 0)))
    y = np.pad(data.y, (0, size - len(data.y)))
    return jnp.asarray(A, jnp.float32), jnp.asarray(y, jnp.float32)


@cache
def prior() -> sp.ScorePrior:
    """The bundled prior with a solver of few steps."""
    flow = digits_flow(jnp.float32)
    assert isinstance(flow.solver, FixedGrid)
    return sp.ScorePrior(with_solver(flow, Multistep(14, flow.solver.time)))


@cache
def problem() -> sp.Problem:
    """An image seen in noise; all data are arguments."""

    def model(A: jax.Array, y: jax.Array, noise: jax.Array) -> None:
        x = numpyro.sample("x", prior())
        numpyro.sample("y", dist.Normal(A @ x.ravel(), noise).to_event(1), obs=y)

    return sp.Problem.from_model(model, *padded("blur", observe("blur", 1.0, 0)), jnp.float32(1.0))


@eqx.filter_jit
def _images(problem: sp.Problem, positions: Any) -> jax.Array:
    return jax.vmap(jax.vmap(lambda position: problem.constrain(position)["x"]))(positions)


def by_engine(engine: Any, name: str, noise: float, data: Data, seed: int) -> np.ndarray:
    """Draws [n, 64] by an engine of the library."""
    given = problem().with_data(*padded(name, data), jnp.float32(noise))
    draws = engine.run(given, jax.random.key(seed), progress=False)
    return np.asarray(_images(draws.problem, draws.positions), float).reshape(-1, 64)


def by_prior(_: None, name: str, noise: float, data: Data, seed: int) -> np.ndarray:
    """Draws of the learned prior, the same for all data."""
    return prior_draws(500, 2).reshape(-1, 64)


@cache
def training_moments() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the training digits, dequantised, with the noise of `sigma_min`."""
    images = load_digits().images
    images = images[np.random.default_rng(0).permutation(len(images))[:1437]].reshape(-1, 64)
    low = digits_flow(jnp.float32).sigma_min
    return images.mean(0) + 0.5, np.cov(images.T) + (1 / 12 + low**2) * np.eye(64)


def by_gaussian(_: None, name: str, noise: float, data: Data, seed: int) -> np.ndarray:
    """Exact draws under the Gaussian with the moments of the training digits."""
    (mean, covariance), (A, _) = training_moments(), matrices(name)
    gain = np.linalg.solve(A @ covariance @ A.T + noise**2 * np.eye(len(A)), A @ covariance).T
    mean = mean + gain @ (data.y - A @ mean)
    root = np.linalg.cholesky(covariance - gain @ A @ covariance + 1e-9 * np.eye(64))
    return mean + np.random.default_rng(seed).standard_normal((500, 64)) @ root.T


@eqx.filter_jit
def tv_chain(key: jax.Array, A: jax.Array, y: jax.Array, noise: Any, strength: Any) -> jax.Array:
    """A chain of NUTS on the logits of pixels, 500 draws after as many steps of warm-up."""

    def image(z: jax.Array) -> jax.Array:
        return LOWEST + (HIGHEST - LOWEST) * jax.nn.sigmoid(z)

    def log_density(z: jax.Array) -> jax.Array:
        x, log_det = image(z), (jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z)).sum()
        down = jnp.diff(x, axis=0, append=x[-1:])
        right = jnp.diff(x, axis=1, append=x[:, -1:])
        total = jnp.sqrt(down**2 + right**2 + 0.01).sum()
        return log_det - strength * total - ((y - A @ x.ravel()) ** 2).sum() / (2 * noise**2)

    key_start, key_warmup, key_steps = jax.random.split(key, 3)
    z = jax.random.normal(key_start, SHAPE)
    warmup = blackjax.window_adaptation(blackjax.nuts, log_density, max_num_doublings=6)
    (state, parameters), _ = warmup.run(key_warmup, z, 500)
    kernel = blackjax.nuts(log_density, **parameters)

    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        state, _ = kernel.step(key, state)
        return state, image(state.position)

    return jax.lax.scan(step, state, jax.random.split(key_steps, 500))[1]


def by_tv(strength: float, name: str, noise: float, data: Data, seed: int) -> np.ndarray:
    """Draws under total variation, of two chains."""
    problem = *padded(name, data), jnp.float32(noise), jnp.float32(strength)
    keys = jax.random.split(jax.random.key(seed), 2)
    return np.concatenate([tv_chain(key, *problem) for key in keys]).astype(float).reshape(-1, 64)


class Method(NamedTuple):
    """`draw(setting, instrument, noise, data, seed)` gives draws [n, 64].

    Of several `settings` one is chosen on other digits, that of the largest `sign * criterion`, a
    row of the measurements.
    """

    draw: Callable[..., np.ndarray]
    settings: Sequence[Any] = (None,)
    criterion: str = "energy score"
    sign: int = -1


def engine(each: Any) -> Method:
    """An engine without a setting to choose."""
    return Method(by_engine, (each,))


NUM_DRAWS = 256
METHODS = {
    "TemperedSMC": engine(
        sp.TemperedSMC(
            64, 2, kernel=HMCMoves(8), target_ess=0.6, max_moves=16, max_autocorrelation=0.2
        )
    ),
    "FeynmanKac, MMPS": engine(sp.FeynmanKac(MMPS(4), 512, 2, 100)),
    "Guided, MMPS": engine(sp.Guided(MMPS(4), NUM_DRAWS, 100)),
    "DAPS": engine(sp.DAPS(NUM_DRAWS, 50, num_ode_steps=5)),
    "Gaussian": Method(by_gaussian),
    "prior": Method(by_prior),
    "Guided, DPS": Method(
        by_engine, [sp.Guided(DPS(s), NUM_DRAWS, 100) for s in (1.0, 3.0, 10.0, 30.0, 100.0)]
    ),
    "Guided, DiffPIR": Method(
        by_engine, [sp.Guided(DiffPIR(w), NUM_DRAWS, 100) for w in (0.3, 1.0, 3.0, 8.0)]
    ),
    "total variation": Method(by_tv, (0.02, 0.05, 0.1, 0.2, 0.4), "log density", 1),
    "NUTS": engine(sp.NUTS(150, 100, 4, target_accept=0.8, max_tree_depth=5)),
}


def measure(
    method: Method, setting: Any, name: str, noise: float, index: int, *, from_prior: bool = False
) -> dict[str, float | None]:
    """Coverage and scores of one posterior; without any where draws are not finite."""
    data = observe(name, noise, index, from_prior=from_prior)
    start = time.perf_counter()
    x = method.draw(setting, name, noise, data, index)
    row: dict[str, float | None] = {"seconds": time.perf_counter() - start}
    if not np.isfinite(x).all():
        return row
    for what, drawn, true in (
        ("pixels", x, data.truth),
        ("brightness", x.sum(1, keepdims=True), data.truth.sum(keepdims=True)),
    ):
        low, lower, upper, high = np.quantile(
            drawn, (0.05, 0.25, 0.75, 0.95), axis=0, method="weibull"
        )
        row[f"{what} 50 %"] = float(np.mean((lower <= true) & (true <= upper)))
        row[f"{what} 90 %"] = float(np.mean((low <= true) & (true <= high)))
    _, A = matrices(name)
    densities = norm.logpdf(data.y_held_out, x @ A.T, noise)
    return row | {
        "PSNR": check.psnr(data.truth, x.mean(0), peak=PEAK),
        "CRPS": float(check.crps(data.truth, x).mean()),
        "energy score": check.energy_score(data.truth, x),
        "log density": float(np.mean(logsumexp(densities, axis=0) - np.log(len(x)))),
    }


COVERED = {
    f"{what} {level} %": level / 100 for what in ("pixels", "brightness") for level in (50, 90)
}
SCORES = ("PSNR", "CRPS", "energy score", "log density")
REFERENCE = "Gaussian"
Rows = dict[int, dict[str, dict[str, float]]]
"""The measurements of a method by digit and kind of problem."""


def choose(
    progress: Progress, label: str, name: str, noise: float, num_others: int
) -> tuple[Any, str]:
    """The setting of a method that does best on other digits, and its name."""
    method = METHODS[label]
    if len(method.settings) == 1:
        return method.settings[0], str(method.settings[0])
    others = range(len(digits()) - num_others, len(digits()))
    means = []
    for setting in method.settings:
        rows = [
            progress(
                f"{label}, {name}, {noise:g}, digit {index} for the setting {_words(setting)}",
                "other digits",
                partial(measure, method, setting, name, noise, index),
            )
            for index in others
        ]
        means.append(np.mean([row.get(method.criterion, np.nan) for row in rows]))
    best = method.settings[int(np.nanargmax(method.sign * np.array(means)))]
    return best, _words(best)


def _words(setting: Any) -> str:
    if isinstance(setting, sp.Guided):
        return str(jax.tree.leaves(setting.guidance)[0].item())
    return str(setting)


def coverage_row(rows: Rows) -> list[str]:
    """Coverage with its standard error over digits, and how many of those it is off by."""
    cells = [str(len(rows)), str(sum(map(len, rows.values())))]
    for what, nominal in COVERED.items():
        each = np.array([np.mean([row[what] for row in kinds.values()]) for kinds in rows.values()])
        # Of few digits all may be covered: the error is at least that of independent entries.
        least = nominal * (1 - nominal) / (64 if what.startswith("pixels") else 1)
        least /= np.mean([len(kinds) for kinds in rows.values()])
        se = np.sqrt(max(each.var(ddof=1), least) / len(each)) if len(each) > 1 else np.nan
        cells.append(f"{each.mean():.3f} ± {se:.3f} ({(each.mean() - nominal) / se:+.1f})")
    return cells


def score_row(rows: Rows, reference: Rows | None) -> list[str]:
    """Scores with standard errors over digits; their differences on the same digits, if any."""
    both = {
        index: [
            (row, reference[index][kind] if reference else None)
            for kind, row in kinds.items()
            if not reference or kind in reference.get(index, {})
        ]
        for index, kinds in rows.items()
    }
    both = {index: pairs for index, pairs in both.items() if pairs}
    cells = [str(len(both))]
    for what in SCORES:
        each = np.array(
            [
                np.mean([row[what] - (other[what] if other else 0.0) for row, other in pairs])
                for pairs in both.values()
            ]
        )
        sign = "" if reference is None else "+"
        se = each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.nan
        cells.append(f"{each.mean():{sign}.3f} ± {se:.3f}" if len(each) else "")
    return cells


def tables(title: str, found: dict[str, Rows], lost: dict[str, int], seconds: Any) -> None:
    """Print coverage and scores."""
    found = {label: rows for label, rows in found.items() if rows}
    columns = ["method", "digits", "posteriors", *COVERED, "not finite", "seconds"]
    rows = [
        [label, *coverage_row(each), lost.get(label, 0), float(np.median(seconds[label]))]
        for label, each in found.items()
    ]
    show(f"{title}: coverage (off by, standard errors)", columns, rows)
    reference = found.get(REFERENCE)
    rows = [
        [label, *score_row(each, None if label == REFERENCE else reference)]
        for label, each in found.items()
    ]
    about = f", less those of {REFERENCE}, which are as they are" if reference else ""
    show(f"{title}: scores{about}", ["method", "digits", *SCORES], rows)


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "imaging")
    parser.add_argument("--digits", type=int, default=100)
    parser.add_argument("--tempered", type=int, default=17, help="digits for TemperedSMC")
    parser.add_argument("--nuts", type=int, default=3, help="digits for NUTS")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--from-prior", action="store_true", help="truths are draws of the prior")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    counts = {"TemperedSMC": options.tempered, "NUTS": options.nuts}
    limit = 2 if options.quick else options.digits
    num_others = 2 if options.quick else NUM_OTHERS
    progress = Progress(options.output)
    cells = [(name, noise) for name in INSTRUMENTS for noise in NOISES]
    results: dict[str, Any] = {}
    for index in range(limit):
        for label in options.methods:
            if index >= min(limit, counts.get(label, limit)):
                continue
            for name, noise in cells:
                truth = f"{'draw' if options.from_prior else 'digit'} {index}"
                title = f"{label}, {name}, {noise:g}, {truth}"
                if options.table:
                    done = [row for (key, _), row in progress.done.items() if key == title]
                else:
                    setting, words = choose(progress, label, name, noise, num_others)
                    method = METHODS[label]
                    case = method, setting, name, noise, index
                    compute = partial(measure, *case, from_prior=options.from_prior)
                    done = [progress(title, words, compute)]
                for row in done[-1:]:
                    results.setdefault(f"{name}, noise {noise:g}", {}).setdefault(label, {})[
                        index
                    ] = row
    report(results)
    if not options.table:
        write(options.output, results)


def report(results: dict[str, Any]) -> None:
    """Tables of every kind of problem, and of all together, by digit."""
    everything: dict[str, Rows] = {}
    all_seconds: dict[str, list[float]] = {}
    all_lost: dict[str, int] = {}
    for title, by_label in results.items():
        found, lost, seconds = {}, {}, {}
        for label, rows in by_label.items():
            finite = {index: {title: row} for index, row in rows.items() if "PSNR" in row}
            found[label], lost[label] = finite, len(rows) - len(finite)
            seconds[label] = [row["seconds"] for row in rows.values()]
            for index, row in finite.items():
                everything.setdefault(label, {}).setdefault(index, {}).update(row)
            all_seconds.setdefault(label, []).extend(seconds[label])
            all_lost[label] = all_lost.get(label, 0) + lost[label]
        tables(title, found, lost, seconds)
    tables("All", everything, all_lost, all_seconds)


if __name__ == "__main__":
    main()
