"""What the benchmarks share: arguments, tables, JSON with the hardware, digits, a plain flow."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import scoreprior
from scoreprior.denoise import VP
from scoreprior.density import AbstractTrace, Exact, FlowDensity
from scoreprior.flow import AbstractSolver, Adaptive, FixedGrid, Flow, LogTime, Multistep
from scoreprior.io import load, load_images

BUDGETS = (8, 16, 32, 64)
"""Denoiser evaluations along the path; a method takes as many whole steps as fit."""


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=(doc or name).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer points and repeats")
    path = Path("results") / f"{name}.json"
    parser.add_argument("--output", type=Path, default=path, help=f"JSON file (default {path})")
    return parser


def hardware() -> dict[str, Any]:
    """The machine and the versions that a measurement depends on."""
    packages = ("jax", "numpyro", "blackjax", "equinox", "numpy")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "scoreprior": scoreprior.__version__,
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table in Markdown; numbers get three significant digits."""
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|---|" + "--:|" * (len(columns) - 1))
    for row in rows:
        print("| " + " | ".join(map(_cell, row)) + " |")


def _cell(value: Any) -> str:
    if not isinstance(value, float | np.floating):
        return str(value)
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def write(path: Path, results: dict[str, Any]) -> None:
    """Write `results` and the hardware as JSON, and print where."""
    machine = hardware()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"hardware": machine, **results}, indent=2) + "\n")
    print(f"\n{machine['processor']}, {machine['cores']} cores, {machine['device']}; {path}")


class Progress:
    """Results kept beside `output`, a line each, so that a program that was stopped goes on.

    `progress(name, settings, compute)` is `compute()`, or what it was when `name` was computed
    under the same `settings` before. Delete the file to measure again.
    """

    def __init__(self, output: Path):
        self.path = output.with_suffix(".jsonl")
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {tuple(map(str, key)): result for key, result in map(json.loads, lines)}

    def __call__(self, name: str, settings: Any, compute: Callable[[], Any]) -> Any:
        key = name, str(settings)
        if key not in self.done:
            self.done[key] = json.loads(json.dumps(compute()))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.done[key]]) + "\n")
            print(name, json.dumps(_rounded(self.done[key])), flush=True)
        return self.done[key]


def _rounded(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: _rounded(value) for name, value in result.items()}
    return float(f"{result:.3g}") if isinstance(result, float) else result


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median time of `function()`, waiting for its result, after one call that is not counted."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cast(tree: Any, dtype: Any) -> Any:
    """`tree` with its floating-point arrays in `dtype`."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def digits_flow(dtype: Any) -> Flow:
    """The flow of the bundled digits prior, computing in `dtype`."""
    return cast(load("digits").flow, dtype)


def held_out_digits(flow: Flow, num_digits: int) -> jax.Array:
    """Held-out digits [num_digits, 8, 8] with the noise at which the density is defined.

    Uniform dequantisation and Gaussian noise of `sigma_min`, from a fixed seed.
    """
    rng = np.random.default_rng(0)
    images = np.asarray(load_images("digits"), float)[:num_digits]
    images = images + rng.uniform(size=images.shape)
    images = images + flow.sigma_min * rng.standard_normal(images.shape)
    return jnp.asarray(images, flow.moments.mean.dtype)


def with_solver(flow: Flow, solver: AbstractSolver) -> Flow:
    """`flow` under another solver."""
    return eqx.tree_at(lambda f: f.solver, flow, solver, is_leaf=lambda x: x is flow.solver)


@eqx.filter_jit
def log_probs(flow: Flow, points: jax.Array) -> jax.Array:
    """Log density of every point by the whitened flow, with the exact trace."""
    return jax.vmap(lambda x: FlowDensity().log_prob(flow, x))(points)


@eqx.filter_jit
def plain_log_probs(flow: Flow, points: jax.Array, solver: AbstractSolver) -> jax.Array:
    """Log density by `dx/dsigma = (x - D) / sigma` in data coordinates, without whitening.

    Two columns, for two terminal laws: `N(0, sigma_max^2 I)`, and the Gaussian with the moments of
    the noisy data, which leaves the error of the integration alone.
    """

    def velocity(sigma, x):
        return (x - flow.denoiser(x, sigma)) / sigma

    def field(sigma, state):
        x, _ = state
        return velocity(sigma, x), Exact()(lambda x: velocity(sigma, x), x)

    def one(x):
        start = (x, jnp.zeros(1, x.dtype))
        end, log_det = solver.solve(field, start, flow.sigma_min, flow.sigma_max)
        usual = jnp.sum(jax.scipy.stats.norm.logpdf(end, scale=flow.sigma_max))
        return log_det + jnp.stack([usual, flow.moments.log_prob(end, flow.sigma_max)])

    return jax.vmap(one)(points)


def rms(errors: jax.Array) -> float:
    """Root of the mean square over points."""
    return float(jnp.sqrt(jnp.mean(errors**2)))


def steps_within(budget: int, solver: FixedGrid | Multistep) -> FixedGrid | Multistep:
    """`solver` with as many whole steps as `budget` evaluations allow."""
    if isinstance(solver, Multistep):
        return Multistep(budget - 2, solver.time)
    return FixedGrid(budget // len(solver.method.nodes), solver.time, solver.method)


class PlainTime(LogTime):
    """The variable of integration as it is."""

    def time(self, sigma):
        return jnp.asarray(sigma)

    def sigma(self, time):
        return time


def vp_log_probs(
    flow: Flow, x: jax.Array, solver: Adaptive, trace: AbstractTrace, last: float
) -> tuple[jax.Array, jax.Array]:
    """Log density by the variance-preserving ODE, for two terminal laws, and the steps tried.

    `y = alpha(t) (x - m) / s` with `s^2` the mean variance, so that `N(0, I)` is the usual terminal
    law; the other one has matched moments. `beta` goes from 0.1 to 20, `t` from the level sigma_min
    to the level `last`.
    """
    mean, variance = flow.moments.mean, flow.moments.eigenvalues.mean()
    scale, schedule = jnp.sqrt(variance), VP(0.1, 20.0)
    ends = schedule.time(flow.sigma_min / scale), schedule.time(last / scale)

    def velocity(t, y):
        (alpha, sigma), rates = jax.jvp(
            lambda t: (schedule.alpha(t), schedule.sigma(t)), (t,), (jnp.ones_like(t),)
        )
        x_hat = (flow.denoiser(mean + scale * y / alpha, scale * sigma / alpha) - mean) / scale
        return rates[0] * x_hat + rates[1] * (y - alpha * x_hat) / sigma

    def field(t, state):
        y, _ = state
        return velocity(t, y), jnp.mean(trace(lambda y: velocity(t, y), y), keepdims=True)

    alpha_min, alpha_max = schedule.alpha(ends[0]), schedule.alpha(ends[1])
    start = (alpha_min * (x - mean) / scale, jnp.zeros(1, x.dtype))
    (y, log_det), num_steps = solver.solve_and_count(field, start, *ends)
    log_det += x.size * jnp.log(alpha_min / scale)
    x_end, size = mean + scale * y / alpha_max, x.size
    matched = flow.moments.log_prob(x_end, last) - size * jnp.log(alpha_max / scale)
    usual = jnp.sum(jax.scipy.stats.norm.logpdf(y))
    return log_det + jnp.stack([usual, matched]), num_steps
