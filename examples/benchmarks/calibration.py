"""Simulation-based calibration of `TemperedSMC` on digits whose lower half is hidden.

    python examples/benchmarks/calibration.py [--quick] [--replicates 100]

Talts et al. (2018): draw the noise level and the digit from the prior, simulate data, infer. Were
the draws from the posterior, the truth would be one of them, and its rank uniform. `from the prior`
tests the engine alone. `held-out digits` takes the digit from the test set instead, which tests the
learned prior as well. `twice the noise` is the negative control: data with twice the noise that the
model says.

With p_g the share of group g's draws below the truth, calibration means E[p_g] = 1/2 and, groups
being independent, E[p_g p_h] = 1/3, whatever the correlation within a group. Deviations from both
are given in standard errors, and that of chi-square for the mean of p_g in five equal bins in
standard deviations; few or correlated draws crowd the middle bins. Beyond 5 is a failure. A stopped
program goes on where it was.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import Progress, arguments, digits_flow, held_out_digits, show, with_solver, write

from scoreprior import FixedGrid, Problem, ScorePrior, TemperedSMC
from scoreprior.smc import HMCMoves

NUM_BINS = 5
Values = Mapping[str, Any]


def build_problem(num_steps: int) -> tuple[Problem, ScorePrior]:
    """The upper half of a digit is seen, with unknown noise of one to four grey levels."""
    flow = digits_flow(jnp.float32)
    assert isinstance(flow.solver, FixedGrid)
    prior = ScorePrior(with_solver(flow, FixedGrid(num_steps, flow.solver.time)))

    def model(y: jax.Array) -> None:
        noise = numpyro.sample("noise", dist.LogNormal(jnp.log(2.0), 0.4))
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[:4], noise).to_event(2), obs=y)

    return Problem.from_model(model, jnp.zeros((4, 8), jnp.float32)), prior


@eqx.filter_jit
def functionals(problem: Problem, positions: Values) -> dict[str, jax.Array]:
    """What is ranked, at positions [group, draw]."""

    def one(position: Values) -> dict[str, jax.Array]:
        values = problem.constrain(position)
        x = values["x"]
        return {
            "noise level": values["noise"],
            "mean of hidden half": x[4:].mean(),
            "hidden pixel": x[5, 4],
            "seen pixel": x[2, 3],
            "log likelihood": problem.log_likelihood(position),
        }

    return jax.vmap(jax.vmap(one))(positions)


@eqx.filter_jit
def simulate(problem: Problem, key: jax.Array, digit: jax.Array | None, factor: float) -> Any:
    """A position, with the digit of the prior if none is given, and data of `factor` its noise."""
    key_position, key_data = jax.random.split(key)
    position = problem.initial(key_position)
    if digit is not None:
        position = problem.unconstrain({**problem.constrain(position), "x": digit})
    values = problem.constrain(position)
    values = {**values, "noise": factor * values["noise"]}
    return position, problem.predict(key_data, values)["y"]


def replicate(
    problem: Problem, engine: TemperedSMC, digit: jax.Array | None, factor: float, seed: int
) -> dict[str, list[float]]:
    """Shares of each group's draws that lie below the truth, by functional."""
    key_data, key = jax.random.split(jax.random.key(seed))
    position, y = simulate(problem, key_data, digit, factor)
    problem = problem.with_data(y)
    draws = engine.run(problem, key, progress=False)
    found = functionals(problem, draws.positions)
    true = functionals(problem, jax.tree.map(lambda leaf: leaf[None, None], position))
    return {name: np.mean(found[name] < true[name], axis=1).tolist() for name in found}


def deviations(shares: np.ndarray) -> list[float]:
    """From shares [replicate, group]: mean, and three deviations in standard errors."""
    count, num_groups = shares.shape
    means = shares.mean(1)
    pairs = (shares.sum(1) ** 2 - (shares**2).sum(1)) / (num_groups * (num_groups - 1))
    bins = np.bincount(np.minimum(means * NUM_BINS, NUM_BINS - 1).astype(int), minlength=NUM_BINS)
    chi_square = ((bins - count / NUM_BINS) ** 2).sum() * NUM_BINS / count
    df = NUM_BINS - 1
    # With infinitely many draws the variances are these, and with few or correlated ones larger.
    first = (means.mean() - 1 / 2) / np.sqrt(max(means.var(), 1 / 12) / count)
    second = (pairs.mean() - 1 / 3) / np.sqrt(max(pairs.var(), 1 / 5 - 1 / 9) / count)
    return [means.mean(), first, second, (chi_square - df) / np.sqrt(2 * df)]


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "calibration")
    parser.add_argument("--replicates", type=int, default=100)
    parser.add_argument("--particles", type=int, default=32, help="per group")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of the solver")
    parser.add_argument("--target-ess", type=float, default=0.6)
    parser.add_argument("--max-moves", type=int, default=8)
    parser.add_argument("--max-autocorrelation", type=float, default=0.5)
    parser.add_argument("--leapfrog", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    problem, prior = build_problem(options.steps)
    count = 10 if options.quick else options.replicates
    digits = held_out_digits(prior.flow, count)
    engine = TemperedSMC(
        options.particles,
        options.groups,
        kernel=HMCMoves(options.leapfrog),
        target_ess=options.target_ess,
        max_moves=options.max_moves,
        max_autocorrelation=options.max_autocorrelation,
    )
    progress = Progress(options.output)
    found: dict[str, list[Any]] = {}
    for i in range(count):
        kinds = {"from the prior": (None, 1.0), "held-out digits": (digits[i], 1.0)}
        if i < max(count // 5, 10):
            kinds["twice the noise"] = (None, 2.0)
        for kind, (digit, factor) in kinds.items():
            below = progress(
                f"{kind}, {i}",
                (options.steps, engine),
                lambda digit=digit, factor=factor, i=i: replicate(
                    problem, engine, digit, factor, i
                ),
            )
            found.setdefault(kind, []).append(below)
    rows = []
    for kind, results in found.items():
        for name in results[0]:
            shares = np.array([result[name] for result in results])
            rows.append([f"{kind}: {name}", len(results), *map(float, deviations(shares))])
    columns = ["truth and quantity", "replicates", "mean rank", "off by, se", "products off by, se"]
    show("Ranks of the truth", [*columns, "chi-square off by, sd"], rows)
    write(options.output, found)


if __name__ == "__main__":
    main()
