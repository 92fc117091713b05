"""Amortised posteriors on the tasks of the sbibm benchmark, by classifier two-sample tests.

    python examples/benchmarks/sbi_tasks.py [--quick] [--tasks two_moons sir] [--simulations 10000]

One default `sbi.NPSE` for all tasks, trained on 10,000 simulations; for each of the ten
observations, the accuracy of the benchmark's classifier between 10,000 draws of it and the
reference draws that come with the tasks (Lueckmann et al., AISTATS 2021): 0.5 is perfect, 1 is
useless. Mean over observations, its largest, and seconds of training and of drawing, compilation
apart. Beside it published means: NPE (Lueckmann et al. 2021), NPSE with a variance-exploding
diffusion and Simformer (Gloeckler et al. 2024, read off figure 3), and the best of eight
configurations of GenSBI's transformers, where given.

Needs `pip install scoreprior[bench]` (sbibm-jax). CPU: five to ten minutes of training per task;
the classifier takes 30 seconds per observation in two dimensions and seven minutes in ten, less
with fewer --draws. A stopped program goes on where it was.
"""

import os
import time
from pathlib import Path
from typing import Any

# Some trajectories of lotka_volterra cannot be solved: they are to be NaN, and left out.
os.environ.setdefault("EQX_ON_ERROR", "nan")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from common import Progress, arguments, show, write

from scoreprior import check, sbi

TASKS = (
    "two_moons",
    "gaussian_linear",
    "gaussian_mixture",
    "gaussian_linear_uniform",
    "slcp",
    "bernoulli_glm",
    "sir",
    "lotka_volterra",
)

PUBLISHED = {  # at 10,000 simulations: NPE, NPSE, Simformer, GenSBI
    "two_moons": (0.606, 0.513, 0.525, 0.522),
    "gaussian_linear": (0.552, 0.572, 0.507, 0.508),
    "gaussian_mixture": (None, 0.528, 0.515, 0.510),  # NPE's predates a corrected simulator
    "gaussian_linear_uniform": (0.553, None, None, None),
    "slcp": (0.901, 0.831, 0.646, 0.657),
    "bernoulli_glm": (0.678, None, None, 0.616),
    "sir": (0.680, None, None, None),
    "lotka_volterra": (0.997, None, None, None),
}


def simulate(name: str, simulator: Any, key: jax.Array, theta: jax.Array) -> jax.Array:
    """Data [n, *x] of `theta` [n, size]; those of lotka_volterra that cannot be solved are NaN."""
    if name != "lotka_volterra":
        return jnp.asarray(simulator(key, theta))

    # Its solver gives up on a whole batch with one of its draws.
    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, theta = inputs
        return simulator(key, theta[None])[0]

    with numpyro.validation_enabled(False):
        return jax.jit(lambda inputs: jax.lax.map(one, inputs))(
            (jax.random.split(key, len(theta)), theta)
        )


def checkpoint_path(folder: Path, name: str, num: int, quick: bool) -> Path:
    """Of the network of a task, trained on `num` simulations."""
    return folder / f"{name}_{num}{'_quick' if quick else ''}.safetensors"


def train(name: str, num: int, folder: Path, quick: bool) -> tuple[sbi.Posterior, float]:
    """The default posterior of a task, and seconds of training; resumes from its checkpoint."""
    import sbibm_jax

    task = sbibm_jax.get_task(name)
    key_theta, key_x, key_fit = jax.random.split(jax.random.key(num), 3)
    prior = task.get_prior_dist()
    theta = prior.sample(key_theta, (num,))
    x = simulate(name, task.get_simulator(key_x), key_x, theta)
    start = time.perf_counter()
    posterior = sbi.NPSE(prior, (theta, x)).fit(
        key=key_fit,
        checkpoint=checkpoint_path(folder, name, num, quick),
        **({"num_steps": 500} if quick else {}),
    )
    return posterior, time.perf_counter() - start


def measure(name: str, posterior: sbi.Posterior, observation: int, num: int) -> dict[str, float]:
    """C2ST at one observation."""
    import sbibm_jax

    task = sbibm_jax.get_task(name)
    reference = np.asarray(task.get_reference_posterior_samples(observation), float)[:num]
    x = jnp.asarray(task.get_observation(observation)).ravel()
    posterior.sample(jax.random.key(0), x, num)
    start = time.perf_counter()
    draws = np.asarray(posterior.sample(jax.random.key(observation), x, num), float)
    seconds = time.perf_counter() - start
    found = check.c2st(reference, draws, n_jobs=2)
    return {"C2ST": float(found.attrs["accuracy"]), "seconds": seconds}


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "sbi_tasks")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--simulations", type=int, nargs="+", default=[10_000])
    parser.add_argument("--draws", type=int, default=10_000, help="for the classifier")
    options = parser.parse_args()
    draws, last = (1000, 2) if options.quick else (options.draws, 10)
    progress, found, rows = Progress(options.output), {}, []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        for num in options.simulations:
            trained: list[Any] = []

            def posterior(name: str = name, num: int = num, trained: list[Any] = trained) -> Any:
                if not trained:
                    trained.append(train(name, num, options.output.parent, options.quick))
                return trained[0]

            label = f"{name}, {num}"
            seconds = progress(f"{label}, training", draws, lambda p=posterior: {"s": p()[1]})["s"]
            results = [
                progress(
                    f"{label}, observation {i}",
                    draws,
                    lambda i=i, p=posterior, name=name: measure(name, p()[0], i, draws),
                )
                for i in range(1, last + 1)
            ]
            found[label] = results
            accuracies = [result["C2ST"] for result in results]
            published = PUBLISHED[name] if num == 10_000 else (None,) * 4
            rows.append(
                [
                    label,
                    float(np.mean(accuracies)),
                    float(np.max(accuracies)),
                    *("" if value is None else value for value in published),
                    seconds,
                    float(np.median([result["seconds"] for result in results])),
                ]
            )
    columns = ["task, simulations", "C2ST", "largest", "NPE", "NPSE", "Simformer", "GenSBI"]
    columns += ["training s", "drawing s"]
    show(f"Classifier two-sample tests, {draws} draws", columns, rows)
    write(options.output, found)


if __name__ == "__main__":
    main()
