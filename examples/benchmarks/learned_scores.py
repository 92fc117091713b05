"""Posteriors of many observations from a learned score: every method with the same network.

    python examples/benchmarks/learned_scores.py [--quick] [--tasks sir] [--methods GAUSS JAC]

One default `sbi.NPSE` for each task, trained on 10,000 simulations. Data sets have parameters from
the prior, and 1, 8 and 30 observations of three tasks of the benchmark sbibm (`tall_tasks`), 5, 20
and 50 of a conjugate Gaussian in two dimensions, on which a released package is off by thousands of
nats with 50. Draws are compared with exact draws of the posterior given all observations: by the
classifier of the benchmark (`C2ST`, 0.5 is perfect); by the largest distance of means, and the
ratio of standard deviations furthest from one, over coordinates, in units of the truth's standard
deviations; and by the divergence of the Gaussian with the moments of the draws from that with the
moments of the truth, in nats, which the Gaussian tasks know in closed form.

What is wrong is in part the network and in part the way that its scores are put together.
`learned` are exact draws of the product of the learned densities, from a table on a grid in two
dimensions: no composition does better but by luck. `against it` is the classifier between a method
and these draws, the error of the composition alone. `exact scores` is ours with the exact score of
every observation, where those are Gaussian.

Ours is `sbi.compose` with `FeynmanKac`; `polished`, by random walks on the density of the product
that start from it. Beside it what `composed_scores` describes, at its numbers of steps, times
--share. Needs `pip install scoreprior[bench]` (sbibm-jax). A stopped program goes on where it was.
"""

import os
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Epidemics that cannot be solved are to be NaN, and left out.
os.environ.setdefault("EQX_ON_ERROR", "nan")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from common import Progress, arguments, show, write
from composed_scores import by_langevin, by_score, standard
from sbi_tasks import PUBLISHED, checkpoint_path, train
from tall_tasks import TASKS, Tall, draw_tables, gaussian_posterior, tabulate

import scoreprior as sp
from scoreprior import Flow, Moments, ScorePrior, check, sbi
from scoreprior.denoise import Gaussian

SIZES = {"conjugate": (5, 20, 50)}
"""Numbers of observations; 1, 8 and 30 of the other tasks."""

NUM_SIMULATIONS = 10_000

VARIANCES = {"conjugate": (1.0, 0.5), "gaussian_linear": (0.1, 0.1)}
"""Of prior and noise, where both are Gaussian."""


class Case(SimpleNamespace):
    """One data set: `posteriors` of each of `x` in `z` [size], and `parameters`."""


@cache
def trained(name: str, folder: Path, quick: bool) -> sbi.Posterior:
    """The default posterior of a task; resumes from the checkpoint of `sbi_tasks`, if it is one."""
    if name in PUBLISHED:
        return train(name, NUM_SIMULATIONS, folder, quick)[0]
    task = TASKS[name]()
    key_theta, key_x, key_fit = jax.random.split(jax.random.key(NUM_SIMULATIONS), 3)
    theta = task.prior.sample(key_theta, (NUM_SIMULATIONS,))
    data = theta, task.simulate(key_x, theta)
    path = checkpoint_path(folder, name, NUM_SIMULATIONS, quick)
    settings = {"num_steps": 500} if quick else {}
    return sbi.NPSE(task.prior, data).fit(key=key_fit, checkpoint=path, **settings)


def data_set(task: Tall, n: int, seed: int) -> jax.Array:
    """`n` observations [n, *x] of one parameter."""
    key_theta, key_x = jax.random.split(jax.random.key(seed))
    theta = task.prior.sample(key_theta) if task.truth is None else jnp.asarray(task.truth)
    return task.simulate(key_x, jnp.broadcast_to(theta, (n, *theta.shape)))


def by_ours(case: Case, num: int, key: Any, num_steps: int) -> tuple[Any, float]:
    """`FeynmanKac` on the product, as in the documentation."""
    product = sbi.compose(case.posteriors, case.law)
    engine = sp.FeynmanKac(None, num_particles=num // 4, num_steps=num_steps)
    tree = sp.infer(_model(product), engine, key=key, progress=False)
    draws = tree.posterior["z"].values.reshape(-1, case.size)
    return draws, float(tree.sample_stats["log_evidence"])


def by_polished(case: Case, num: int, key: Any, num_steps: int) -> tuple[Any, float]:
    """Random walks on the density of the product, started at draws of `FeynmanKac`."""
    key_cloud, key_walk = jax.random.split(key)
    draws, _ = by_ours(case, num, key_cloud, num_steps)
    walk = sp.RandomWalk(
        num_warmup=100,
        num_samples=num // 100,
        num_chains=100,
        thinning=5,
        centred=True,
        init=sp.GivenValues({"z": draws}),
    )
    product = sbi.compose(case.posteriors, case.law)
    tree = sp.infer(_model(product), walk, key=key_walk, progress=False)
    return tree.posterior["z"].values.reshape(-1, case.size), float("nan")


def by_exact_scores(case: Case, num: int, key: Any, num_steps: int) -> tuple[Any, float]:
    """Ours with the exact posterior of every observation."""
    prior_variance, noise = VARIANCES[case.task]
    scale, posteriors = np.sqrt(prior_variance), []
    first = case.posteriors[0].flow
    levels = {"sigma_min": first.sigma_min, "sigma_max": first.sigma_max}
    for one in np.asarray(case.x, float):
        mean, variance = gaussian_posterior(one[None], prior_variance, noise)
        moments = Moments.dense(jnp.asarray(mean / scale), variance / scale**2 * jnp.eye(case.size))
        posteriors.append(ScorePrior(Flow(Gaussian(moments), moments, **levels)))
    exact = Case(posteriors=posteriors, size=case.size, law=standard(case.size))
    return by_ours(exact, num, key, num_steps)


def by_learned(case: Case, num: int, key: Any) -> tuple[Any, float]:
    """Exact draws of the product of the learned densities, in two dimensions.

    The two modes of `two_moons`, mirror images of each other, have a table each.
    """
    product = sbi.compose(case.posteriors, case.law)
    rough, _ = by_ours(case, 400, key, case.steps)

    def log_density(points: np.ndarray) -> np.ndarray:
        return np.asarray(_log_probs(product, jnp.asarray(points, rough.dtype)), float)

    has_two = case.task == "two_moons"
    if has_two:
        rough = np.where(rough.sum(1, keepdims=True) > 0, rough, -rough[:, ::-1])
    spread = np.ptp(rough, 0)
    box = np.stack([rough.min(0) - spread / 2, rough.max(0) + spread / 2])
    boxes = [box, -box[::-1, ::-1]] if has_two else [box]
    cells = 100 if has_two or len(case.posteriors) == 1 else 40
    tables = [tabulate(log_density, box, cells=cells, depth=12.0) for box in boxes]
    return draw_tables(tables, num, np.random.default_rng(0)), float("nan")


@eqx.filter_jit
def _log_probs(product: sbi.Product, z: jax.Array) -> jax.Array:
    return jax.lax.map(product.log_prob, z, batch_size=1000)


def _model(product: sbi.Product) -> Callable[[], None]:
    def model() -> None:
        numpyro.sample("z", product)

    return model


def methods(share: float) -> dict[str, Callable[..., Any]]:
    """Of a case, a number of draws and a key: draws of `z` and the evidence ratio."""

    def steps(num: int) -> int:
        return round(share * num)

    return {
        "learned": by_learned,
        "product": lambda case, *args: by_ours(case, *args, case.steps),
        "polished": lambda case, *args: by_polished(case, *args, case.steps),
        "F-NPSE, Langevin": partial(by_langevin, num_levels=steps(400)),
        "GAUSS": lambda *args: by_score(sbi.GAUSS, steps(1000), *args),
        "JAC": lambda *args: by_score(sbi.JAC, steps(400), *args),
        "damping": lambda *args: by_score(sbi.Damped, steps(1000), *args),
        "sum of scores": lambda *args: by_score(sbi.Sum, steps(1000), *args),
        "exact scores": lambda case, *args: by_exact_scores(case, *args, case.steps),
    }


def applies(method: str, task: str, n: int) -> bool:
    """Whether a task has what a method needs."""
    if method == "exact scores":
        return task in VARIANCES
    if method == "damping":
        return n > 1
    return task != "gaussian_linear" or method not in ("learned", "polished")


def classified(exact: np.ndarray, draws: np.ndarray) -> float:
    """C2ST; 1 where a method diverged."""
    if not np.isfinite(draws).all():
        return 1.0
    return float(check.c2st(exact, draws).attrs["accuracy"])


def moments(exact: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    """Of the draws against the truth, and the divergence of the Gaussians with these moments."""
    if not np.isfinite(draws).all():
        return dict.fromkeys(("shift", "sd ratio", "KL"), float("nan"))
    means, covariances = zip(*((v.mean(0), np.cov(v.T)) for v in (exact, draws)), strict=True)
    scale = np.sqrt(np.diag(covariances[0]))
    ratios = np.sqrt(np.diag(covariances[1])) / scale
    apart, inverse = means[1] - means[0], np.linalg.inv(covariances[0])
    logs = [np.linalg.slogdet(one)[1] for one in covariances]
    divergence = np.trace(inverse @ covariances[1]) - len(scale) + apart @ inverse @ apart
    return {
        "shift": float(np.abs(apart / scale).max()),
        "sd ratio": float(ratios[np.abs(np.log(ratios)).argmax()]),
        "KL": float(divergence + logs[0] - logs[1]) / 2,
    }


class Bench:
    """All methods on all data sets of one task."""

    def __init__(self, name: str, options: Any):
        self.name, self.options, self.task = name, options, TASKS[name]()
        self.methods = methods(options.share)
        self.references: dict[Any, np.ndarray] = {}

    def case(self, n: int, seed: int) -> Case:
        """One data set and its posteriors."""
        posterior = trained(self.name, self.options.output.parent, self.options.quick)
        x = data_set(self.task, n, seed)
        return Case(
            task=self.name,
            x=x,
            posteriors=[posterior.condition(one) for one in x],
            parameters=posterior.parameters,
            law=posterior.parameters.law,
            size=posterior.parameters.size,
            steps=200 if self.name == "two_moons" else 100,
        )

    def draw(self, n: int, seed: int, method: str) -> dict[str, Any]:
        """Draws for one data set by one method, which are kept."""
        case, num = self.case(n, seed), self.options.draws
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            draws, ratio = self.methods[method](case, num, jax.random.key(seed))
        seconds = time.perf_counter() - start
        path = self._path(n, seed, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.asarray(draws))
        said = sorted({str(w.message).split(":")[0] for w in raised})
        return {"evidence": ratio, "seconds": seconds, "warnings": said}

    def judge(self, n: int, seed: int, method: str) -> dict[str, Any]:
        """What was drawn against the truth and against the product of learned densities."""
        draws = np.load(self._path(n, seed, method))
        parameters = trained(self.name, self.options.output.parent, self.options.quick).parameters
        exact = self.exact(n, seed)
        theta = np.asarray(jax.vmap(parameters.from_vector)(jnp.asarray(draws)), float)
        found: dict[str, Any] = moments(exact, theta)
        if seed < self.options.classified:
            found["C2ST"] = classified(exact[: len(theta)], theta)
        kept = self._path(n, seed, "learned")
        if method != "learned" and kept.exists():
            found["against it"] = classified(np.load(kept), draws)
        return found

    def exact(self, n: int, seed: int) -> np.ndarray:
        """Many exact draws of `theta`, made once."""
        if (n, seed) not in self.references:
            x = np.asarray(data_set(self.task, n, seed), float)
            self.references[n, seed] = self.task.exact(x, 50_000, np.random.default_rng(seed))
        return self.references[n, seed]

    def _path(self, n: int, seed: int, method: str) -> Path:
        folder = self.options.output.with_suffix("")
        return folder / f"{self.name}_{n}_{seed}_{method.replace(' ', '_')}.npy"


def reference_check(name: str, task: Tall) -> float:
    """C2ST of our exact draws and those that come with the benchmark, mean of three data sets."""
    import sbibm_jax

    theirs, found = sbibm_jax.get_task(name), []
    for i in (1, 2, 3):
        x = np.asarray(theirs.get_observation(i), float).reshape(1, -1)
        ours = task.exact(x, 2000, np.random.default_rng(i))
        reference = np.asarray(theirs.get_reference_posterior_samples(i), float)[:2000]
        found.append(float(check.c2st(reference, ours).attrs["accuracy"]))
    return float(np.mean(found))


COLUMNS = ("C2ST", "against it", "shift", "sd ratio", "KL", "seconds")


def summary(results: list[dict[str, Any]]) -> list[Any]:
    """Means over data sets of what was measured; medians of divergences and of seconds."""
    row: list[Any] = []
    for column in COLUMNS:
        values = [result[column] for result in results if column in result]
        middle = np.median if column in ("KL", "seconds") else np.mean
        row.append(float(middle(values)) if values else "")
    return row


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "learned_scores")
    names = list(methods(1.0))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of observations")
    parser.add_argument("--repeats", type=int, default=5, help="data sets of every kind")
    parser.add_argument("--classified", type=int, default=5, help="of these, with a classifier")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--share", type=float, default=1.0, help="of the published steps")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.share, options.draws = 1, 0.1, 200
    progress, found = Progress(options.output), {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = options.draws, options.share, options.quick
    for name in options.tasks:
        bench, rows = Bench(name, options), []
        if name != "conjugate":
            value = progress(f"{name}, reference", 1, partial(reference_check, name, bench.task))
            print(f"{name}: C2ST of our reference against the benchmark's {value:.3f}")
        sizes = options.sizes or SIZES.get(name, (1, 8, 30))
        for n in sizes[: 2 if options.quick else None]:
            for method in options.methods:
                if not applies(method, name, n):
                    continue
                label = f"{name}, n = {n}, {method}"
                results = []
                for seed in range(options.repeats):
                    which = n, seed, method
                    one = progress(f"{label}, {seed}, drawn", settings, partial(bench.draw, *which))
                    results.append(
                        one | progress(f"{label}, {seed}", settings, partial(bench.judge, *which))
                    )
                rows.append([f"{n}, {method}", *summary(results)])
                found[label] = results
        show(f"{name}, {options.repeats} data sets", ["n, method", *COLUMNS], rows)
    write(options.output, found)


if __name__ == "__main__":
    main()
