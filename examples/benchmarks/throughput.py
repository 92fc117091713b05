"""Throughput of `FeynmanKac` beside a hand-written loop, and its memory by 100,000 particles.

    python examples/benchmarks/throughput.py [--quick]

The square of the bundled digits prior, 4 groups of 500 particles, 60 levels, variance control and
trapezoid weights: by the engine, and by one file of plain JAX for this algorithm on the same
network (`plain` below, which knows nothing else: no record, no checkpoint, no progress). Both
compiled before; seconds of whole runs by turns, single precision, medians. Then the peak memory of
fresh processes that run 100,000 particles of the digits prior for 3 levels with `batch_size=1000`.
CPU, about five minutes.
"""

import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import arguments, show, write

import scoreprior as sp
from scoreprior.feynman_kac import VarianceControl

GROUPS, PARTICLES, STEPS, BETA = 4, 500, 60, 2.0


def plain(flow: sp.Flow) -> Callable[[jax.Array], Any]:
    """`key -> (draws, log evidence)` of all groups, for `flow` to the power `BETA`."""
    low, n, d = flow.sigma_min, PARTICLES, flow.moments.mean.size
    sigmas = jnp.geomspace(flow.sigma_max, low, STEPS + 1)
    squares = (sigmas**2 - low**2).at[-1].set(0.0)
    hs, rs = squares[:-1] - squares[1:], jnp.sqrt(squares)
    mean, spread = flow.moments.mean, jnp.mean(flow.moments.eigenvalues)

    def scores(x, r, key):
        sigma = jnp.sqrt(r**2 + low**2)
        probe = jax.random.rademacher(key, x.shape, x.dtype)

        def score(x):
            return (jax.vmap(flow.denoiser, (0, None))(x, sigma) - x) / sigma**2

        s, slope = jax.jvp(score, (x,), (probe,))
        precision = BETA / (spread + sigma**2)
        S, G = BETA * s, precision * (mean - x)
        rate = (BETA**2 - BETA) / 2 * jnp.sum(s**2, (1, 2))
        response = jnp.stack(
            [
                jnp.sum(S * S + BETA * probe * slope, (1, 2)),
                jnp.sum(S * G, (1, 2)) - d * precision,
            ],
            1,
        )
        return S, G, rate, response

    def resample(key, log_w, tree):
        weights = jax.nn.softmax(log_w)

        def draw():
            ticks = (jnp.arange(n) + jax.random.uniform(key)) / n
            rows = jnp.clip(jnp.searchsorted(jnp.cumsum(weights), ticks), 0, n - 1)
            level = jax.nn.logsumexp(log_w) - jnp.log(n)
            return jnp.full(n, level), jax.tree.map(lambda leaf: leaf[rows], tree)

        few = 1 / jnp.sum(weights**2) < n / 2
        return jax.lax.cond(few, draw, lambda: (log_w, tree))

    def solve(log_w, rate, response):
        w = jax.nn.softmax(log_w)
        rate, response = rate - w @ rate, response - w @ response
        values, vectors = jnp.linalg.eigh((response.T * w) @ response)
        known = values > 1e3 * jnp.finfo(values.dtype).eps * values[-1]
        inverse = jnp.where(known, 1 / jnp.where(known, values, 1.0), 0.0)
        return -vectors @ (inverse * (vectors.T @ (response.T @ (w * rate))))

    def step(carry, inputs):
        x, log_w, known, last = carry
        k, key = inputs
        key_resample, key_noise, key_probe = jax.random.split(key, 3)
        log_w, (x, known, last) = resample(key_resample, log_w, (x, known, last))
        S, G, rate, response = known
        drift_before, rate_before, response_before = last
        theta = jnp.where(k == 0, 0.0, solve(log_w, rate_before, response_before))
        h = hs[k]
        drift = S + theta[0] * S + theta[1] * G
        ahead = jnp.where(k == 0, 0.0, h / (2 * hs[k - 1]))
        noise = jax.random.normal(key_noise, x.shape, x.dtype)
        x = x + h * (drift + ahead * (drift - drift_before)) + jnp.sqrt(h) * noise
        new = scores(x, rs[k + 1], key_probe)
        rate, response = h * (rate + new[2]) / 2, h * (response + new[3]) / 2
        return (x, log_w + rate + response @ theta, new, (drift, rate, response)), None

    def one(key):
        key_first, key_probe, key_steps = jax.random.split(key, 3)
        variance = (spread + sigmas[0] ** 2) / BETA
        noise = jax.random.normal(key_first, (n, *mean.shape), mean.dtype)
        x = mean + jnp.sqrt(variance) * noise
        log_q = jax.vmap(lambda x: flow.moments.log_prob(x, sigmas[0]))(x)
        log_w = BETA * log_q + jnp.sum(noise**2 + jnp.log(2 * jnp.pi * variance), (1, 2)) / 2
        last = jnp.zeros_like(x), jnp.zeros(n), jnp.zeros((n, 2))
        carry = x, log_w, scores(x, rs[0], key_probe), last
        inputs = jnp.arange(STEPS), jax.random.split(key_steps, STEPS)
        (x, log_w, _, _), _ = jax.lax.scan(step, carry, inputs)
        return x, jax.nn.logsumexp(log_w) - jnp.log(n)

    return jax.jit(lambda key: jax.lax.map(one, jax.random.split(key, GROUPS)))


def speed(repeats: int) -> dict[str, Any]:
    """Seconds of both, by turns, and their log evidences."""
    prior = sp.load("digits")
    law, loop = sp.compose({prior: BETA}), plain(prior.flow)
    problem = sp.Problem.from_model(lambda: numpyro.sample("x", law))
    engine = sp.FeynmanKac(None, PARTICLES, GROUPS, STEPS, chunk_size=STEPS)

    def by_engine(key: jax.Array) -> Any:
        draws = engine.run(problem, key, progress=False)
        return draws.positions["x"], draws.extra["group_log_evidence"][1]

    runs = {"FeynmanKac": by_engine, "plain loop": loop}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    evidences: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):  # the first compiles and is not counted
        for name, function in runs.items():
            start = time.perf_counter()
            _, log_z = jax.block_until_ready(function(jax.random.key(i)))
            seconds[name].append(time.perf_counter() - start)
            print(name, round(seconds[name][-1], 3), flush=True)
            evidences[name] += np.asarray(log_z, float).tolist()
    compiled = {name: times[1:] for name, times in seconds.items()}
    work, rows = GROUPS * PARTICLES * STEPS, []
    for name, times in compiled.items():
        middle, spread = statistics.median(times), statistics.stdev(evidences[name])
        log_z = statistics.mean(evidences[name])
        error = spread / math.sqrt(len(evidences[name]))
        rows.append([name, work / middle, middle, seconds[name][0], log_z, error])
    ratios = [a / b for b, a in zip(*compiled.values(), strict=True)]
    columns = ["", "particles x steps / s", "median s", "first run, s", "log Z", "its se"]
    show(f"Throughput, {repeats} turns", columns, rows)
    print(
        f"\nratio of medians {rows[0][1] / rows[1][1]:.3f}, "
        f"median ratio of turns {statistics.median(ratios):.3f}"
    )
    return {"seconds": seconds, "rows": rows, "ratios": ratios}


def hundred_thousand(kind: str) -> None:
    """Run 100,000 particles and print the peak memory of this process, in GB, and seconds."""
    prior = sp.load("digits")

    def model() -> None:
        x = numpyro.sample("x", prior)
        if kind == "posterior":
            numpyro.sample(
                "y", dist.Normal(x[::2, ::2], 1.0).to_event(2), obs=jnp.full((4, 4), 8.0)
            )

    posterior = kind == "posterior"
    guidance = sp.guide.JFPS(prior.flow.moments) if posterior else None
    control = None if posterior else VarianceControl()
    engine = sp.FeynmanKac(guidance, 100_000, 1, 3, control=control, batch_size=1000)
    start = time.perf_counter()
    engine.run(sp.Problem.from_model(model), jax.random.key(0), progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(peak, time.perf_counter() - start)


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "throughput")
    parser.add_argument("--memory-of", choices=("controlled", "posterior"), help="in this process")
    parser.add_argument("--only", choices=("speed", "memory"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    if options.memory_of:
        return hundred_thousand(options.memory_of)
    results = {}
    if options.only != "memory":
        results["speed"] = speed(3 if options.quick else 7)
    if options.only != "speed":
        rows = []
        for kind in ("controlled", "posterior"):
            command = [sys.executable, __file__, "--memory-of", kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append([kind, *map(float, done.stdout.split()[-2:])])
        show("100,000 particles, 3 levels, batches of 1,000", ["", "peak GB", "seconds"], rows)
        results["memory"] = rows
    write(options.output, results)


if __name__ == "__main__":
    main()
