"""Corrected guidance and compositions of digits, beside NUTS and tempered SMC.

    python examples/benchmarks/digits_corrected.py [--quick] [--problems product ...]
        [--laws network mixture] [--engines FeynmanKac NUTS ...]

Problems: `prior`, no data at all; `product`, the digits times a mixture of two priors, Gaussians
with the moments of the threes and of the fives, one grey level wider; `low temperature`, the square
of the digits; and held-out digit 12 seen as in the demo with a noise of two grey levels: `inpaint`,
the upper half, and `deblur`, all of it blurred.

Each with two laws in the part of the digits. `network` is the bundled prior. Its score at every
noise level is what `FeynmanKac` follows, and the density of its flow is what `NUTS` and
`TemperedSMC` have: for a learned score these are two laws. `mixture` is the control, ten Gaussians
with the moments of the ten classes, where the score is exact, the two laws are one, and draws and
evidence are known in closed form. What an engine is off by there is its own error.

Measured against exact draws (for `prior` and `network`, draws of the flow), or for `network`
against a run with a key of its own (see `REFERENCES`): differences of means and standard deviations
in Monte-Carlo standard errors (root mean square over pixels, about 1 where they agree), the largest
shift of a mean in standard deviations, the median ratio of standard deviations, the sliced
Wasserstein distance of 1,000 draws over its floor, the log evidence, the largest R-hat of chains
and the fewest ancestors of a cloud. `FeynmanKac, 400 steps` and `TemperedSMC, long moves` separate
the errors of steps and of moves from a difference of laws.

Evaluations are those of the denoiser of the digits, warm-up included, derivatives not counted: one
per particle and step of `FeynmanKac`, and for engines that solve the flow all that the solver
makes. On the square of the digits the exact trace of the flow takes 64 Jacobian-vector products
with each, so only the reference and `FeynmanKac` run there, and chains start from draws of
`FeynmanKac`. Seconds include compilation. Single precision, CPU, about an hour; a stopped program
goes on where it was.
"""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import engines
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import Progress, arguments, digits_flow, held_out_digits, show, with_solver, write
from engines import counted, draws
from mixtures import sliced_wasserstein
from sklearn.datasets import load_digits

import scoreprior as sp
from scoreprior.cli import OBSERVATIONS
from scoreprior.denoise import GaussianMixture
from scoreprior.density import AbstractDensity
from scoreprior.flow import FixedGrid, Flow, Multistep
from scoreprior.guide import JFPS, MMPS, TMPD
from scoreprior.mcmc import GivenValues
from scoreprior.smc import HMCMoves

DIGIT, NOISE, WIDER = 12, 2.0, 1.0


class ClosedForm(AbstractDensity):
    """The density of an exact denoiser, normalised."""

    def log_prob(self, flow: Flow, x: jax.Array) -> jax.Array:
        return flow.denoiser.log_prob(x, flow.sigma_min)


class Mixture(NamedTuple):
    """Full components: log weights [K], means [K, 64], covariances [K, 64, 64]; double precision.

    The sum of the weights is the normaliser.
    """

    log_weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    @property
    def log_normaliser(self) -> float:
        return float(np.logaddexp.reduce(self.log_weights))

    def noisy(self, sigma: float) -> "Mixture":
        return self._replace(covariances=self.covariances + sigma**2 * np.eye(64))

    def prior(self, like: Flow) -> sp.ScorePrior:
        parts = (jnp.asarray(part, jnp.float32) for part in self)
        log_weights, means, covariances = parts
        law = GaussianMixture.full(
            jax.nn.softmax(log_weights), means.reshape(-1, 8, 8), covariances
        )
        flow = Flow(law, law.moments(), sigma_min=like.sigma_min, sigma_max=like.sigma_max)
        return sp.ScorePrior(flow, density=ClosedForm())

    def times(self, other: "Mixture") -> "Mixture":
        """The product of the densities."""
        found = [
            _condition(m, C, np.eye(64), n, D, v + w)
            for v, m, C in zip(*self, strict=True)
            for w, n, D in zip(*other, strict=True)
        ]
        return Mixture(*map(np.stack, zip(*found, strict=True)))

    def given(self, A: np.ndarray, y: np.ndarray, variance: float) -> "Mixture":
        """The joint density with `y = A x + N(0, variance I)`."""
        noise = variance * np.eye(len(y))
        found = [_condition(m, C, A, y, noise, w) for w, m, C in zip(*self, strict=True)]
        return Mixture(*map(np.stack, zip(*found, strict=True)))

    def draw(self, num_draws: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        weights = np.exp(self.log_weights - self.log_normaliser)
        rows = rng.choice(len(weights), num_draws, p=weights)
        roots = np.linalg.cholesky(self.covariances)
        return self.means[rows] + np.einsum(
            "nij,nj->ni", roots[rows], rng.standard_normal((num_draws, 64))
        )


def _condition(
    m: np.ndarray, C: np.ndarray, A: np.ndarray, y: np.ndarray, noise: np.ndarray, log_w: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log weight, mean and covariance of `N(x; m, C) N(y; A x, noise)`."""
    S, residual = A @ C @ A.T + noise, y - A @ m
    gain = np.linalg.solve(S, A @ C).T
    _, log_det = np.linalg.slogdet(2 * np.pi * S)
    log_w = log_w - (residual @ np.linalg.solve(S, residual) + log_det) / 2
    covariance = C - gain @ A @ C
    return log_w, m + gain @ residual, (covariance + covariance.T) / 2


def classes(digits: tuple[int, ...], wider: float = 0.0) -> Mixture:
    """Gaussians with the moments of dequantised training images of each of `digits`."""
    bundle = load_digits()
    rows = np.random.default_rng(0).permutation(len(bundle.images))[:1437]
    images, labels = bundle.images[rows].reshape(-1, 64), bundle.target[rows]
    parts = [images[labels == digit] for digit in digits]
    counts = np.array([len(part) for part in parts], float)
    covariances = [np.cov(part.T) + (1 / 12 + wider**2) * np.eye(64) for part in parts]
    means = [part.mean(0) + 0.5 for part in parts]
    return Mixture(np.log(counts / counts.sum()), np.stack(means), np.stack(covariances))


class Case(NamedTuple):
    """A problem, the evaluations of the digits' denoiser by one of the model, and the truth.

    `sample(n, seed)` gives exact draws [n, 64], if there are any.
    """

    problem: sp.Problem
    num_evaluations: int
    sample: Callable[[int, int], np.ndarray] | None
    log_evidence: float = np.nan


def network() -> sp.ScorePrior:
    """The bundled prior with a solver of few steps."""
    flow = digits_flow(jnp.float32)
    assert isinstance(flow.solver, FixedGrid)
    return sp.ScorePrior(with_solver(flow, Multistep(14, flow.solver.time)))


def make(name: str, law: str) -> Case:
    """The problem `name` with the digits by `law`."""
    learned = network()
    flow, low = learned.flow, learned.sigma_min
    control = classes(tuple(range(10)))
    prior = learned if law == "network" else control.prior(flow)
    solve = prior.flow.solver.num_evaluations
    exact = control.noisy(low)
    if name in OBSERVATIONS:
        return _seen(name, prior, solve, exact, law)
    if name == "prior":
        site, composed = prior, exact
    elif name == "product":
        other = classes((3, 5), WIDER)
        site = sp.compose({prior: 1.0, other.prior(flow): 1.0})
        composed = exact.times(other.noisy(low))
    else:
        site, composed = sp.compose({prior: 2.0}), exact.times(exact)

    def model() -> None:
        x = numpyro.sample("x", site)
        numpyro.factor("counted", 0.0 * jnp.sum(counted(x)))

    problem = sp.Problem.from_model(model)
    if law == "mixture":
        return Case(problem, solve, composed.draw, composed.log_normaliser)
    if name == "low temperature":
        solve *= 2  # there and, for the density, back
    return Case(problem, solve, partial(_flow_draws, flow) if name == "prior" else None)


def _seen(name: str, prior: sp.ScorePrior, solve: int, exact: Mixture, law: str) -> Case:
    forward = OBSERVATIONS[name].forward
    truth = held_out_digits(digits_flow(jnp.float32), DIGIT + 1)[DIGIT]
    clean = forward(truth)
    y = clean + NOISE * jax.random.normal(jax.random.key(1), clean.shape)

    def model(y: jax.Array) -> None:
        x = counted(numpyro.sample("x", prior))
        numpyro.sample("y", dist.Normal(forward(x), NOISE).to_event(2), obs=y)

    problem = sp.Problem.from_model(model, y)
    if law == "network":
        return Case(problem, solve, None)
    basis = jnp.eye(64).reshape(64, 8, 8)
    A = np.asarray(jax.vmap(forward)(basis), float).reshape(64, -1).T
    posterior = exact.given(A, np.asarray(y, float).ravel(), NOISE**2)
    return Case(problem, solve, posterior.draw, posterior.log_normaliser)


def _flow_draws(flow: Flow, num_draws: int, seed: int) -> np.ndarray:
    fine = with_solver(flow, Multistep(40, flow.solver.time))
    noise = jax.random.normal(jax.random.key(100 + seed), (num_draws, 8, 8))
    return np.asarray(jax.jit(jax.vmap(fine.to_data))(noise), float).reshape(num_draws, 64)


COMPOSITIONS = {
    "FeynmanKac": sp.FeynmanKac(None, 2000, 4, 200),
    "FeynmanKac, 400 steps": sp.FeynmanKac(None, 1000, 4, 400),
}
METHODS = {"TMPD": TMPD(), "MMPS": MMPS(8), "JFPS": JFPS(digits_flow(jnp.float32).moments)}
"""Guidance to correct."""
CORRECTED = {f"FeynmanKac, {name}": sp.FeynmanKac(each, 500) for name, each in METHODS.items()}
UNCORRECTED = {"Guided, TMPD": sp.Guided(METHODS["TMPD"])}
CHAINS = {
    "NUTS": sp.NUTS(200, 200, 8, target_accept=0.8, max_tree_depth=5),
    "TemperedSMC": sp.TemperedSMC(128),
    "TemperedSMC, long moves": sp.TemperedSMC(128, kernel=HMCMoves(8), max_autocorrelation=0.2),
}
ENGINES = {
    "prior": COMPOSITIONS,
    "product": COMPOSITIONS | CHAINS,
    "low temperature": COMPOSITIONS | CHAINS,
    "inpaint": CORRECTED | UNCORRECTED | CHAINS,
    "deblur": CORRECTED | CHAINS,
}
TOO_LONG = ("low temperature", "network")
"""Where only the reference and `FeynmanKac` run."""
REFERENCES = {
    "product": CHAINS["TemperedSMC"],
    "low temperature": sp.NUTS(40, 40, 16, target_accept=0.8, max_tree_depth=3),
    "inpaint": CHAINS["NUTS"],
    "deblur": CHAINS["NUTS"],
}
"""What stands for the truth for `network`, with a key of its own."""
LAWS = ("network", "mixture")


def run(name: str, case: Case, engine: Any, seed: int, checkpoint: str | None = None) -> Any:
    """The tree and the calls of the model; NUTS on a square starts from `FeynmanKac`."""
    key = jax.random.key(seed)
    if name == "low temperature" and isinstance(engine, sp.NUTS):
        start = sp.FeynmanKac(None, 500, 4, 200)
        tree = sp.infer(case.problem, start, key=jax.random.key(10 + seed), progress=False)
        x = draws(tree, engine.num_chains).reshape(-1, 8, 8).astype(np.float32)
        engine = dataclasses.replace(engine, init=GivenValues({"x": x}))
    before = engines.evaluations
    tree = sp.infer(case.problem, engine, key=key, progress=False, checkpoint=checkpoint)
    return tree, engines.evaluations - before


def measure(name: str, case: Case, engine: Any, reference: Any | None) -> dict[str, float]:
    """Distances and cost of `engine`; `reference` stands for the truth where it is unknown."""
    tree, calls = run(name, case, engine, 0)
    cost = engines.cost_of(engine, tree, calls * case.num_evaluations)
    x = draws(tree)
    if case.sample is None:
        truth = reference
        parts = np.random.default_rng(0).permutation(draws(truth))
        exact, other = np.array_split(parts, 2)
        x = draws(tree, len(exact))
    else:
        truth = engines.exact_tree(case.sample(40_000, 2), tree)
        exact, other = (case.sample(len(x), seed) for seed in range(2))
    row = sp.compare(truth, tree).iloc[1]
    stats = tree["sample_stats"].to_dataset()
    fewest = np.nan
    if "unique_ancestors" in stats:
        fewest = float(stats["unique_ancestors"].values[:, -1].min())
    return {
        "means off by, se": row["mean_z_rms"],
        "sds off by, se": row["sd_z_rms"],
        "largest shift, sd": row["mean_shift"],
        "sd ratio": row["sd_ratio"],
        "SW over floor": sliced_wasserstein(x, exact) / sliced_wasserstein(other, exact),
        "log evidence": row["log_evidence"],
        "its se": row["log_evidence_se"],
        "exact": case.log_evidence,
        "R-hat": row["max_r_hat"] if "ancestor" not in stats else np.nan,
        "fewest ancestors": fewest,
        "thousand evaluations": cost / 1e3,
        "seconds": row["seconds"],
    }


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "digits_corrected")
    every = {label: None for found in ENGINES.values() for label in found}
    parser.add_argument("--problems", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=LAWS)
    parser.add_argument("--engines", nargs="+", default=list(every), choices=every)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    progress = Progress(options.output)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.problems[: 1 if options.quick else None]:
        for law in options.laws:
            case, title = make(name, law), f"{name}, {law}"
            reference, found[title] = None, {}
            if case.sample is None:
                engine = REFERENCES[name]
                folder = options.output.with_suffix("") / name.replace(" ", "_")
                reference, _ = run(name, case, engine, 1, str(folder))
            for label, engine in ENGINES[name].items():
                long = (name, law) == TOO_LONG and label not in COMPOSITIONS
                if label in options.engines and not long:
                    found[title][label] = progress(
                        f"{title}, {label}",
                        engine,
                        partial(measure, name, case, engine, reference),
                    )
                    jax.clear_caches()
            columns = list(next(iter(found[title].values()), {}))
            rows = [[label, *result.values()] for label, result in found[title].items()]
            show(title, ["engine", *columns], rows)
    write(options.output, found)


if __name__ == "__main__":
    main()
