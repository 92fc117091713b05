"""Seconds for 10,000 draws of an amortised posterior: scoreprior, sbi and gensbi.

    python examples/benchmarks/sampling_speed.py [--quick] [--tasks two_moons] [--sbi PYTHON]

The default `sbi.NPSE`; the default `NPSE` of sbi (github.com/sbi-dev/sbi; PyTorch), a variance-
exploding diffusion, with its own perceptron at the width that gives as many weights; and EDM
diffusion of gensbi (github.com/aurelio-amerio/GenSBI; JAX), which leaves the network to its user:
here that of scoreprior, rewritten in Flax, with the learning rate, batches and steps of scoreprior.
All learn from the same 10,000 simulations of a task of sbibm. Every package runs in a process of
its own, pinned to the same core, in single precision, and draws in one call of its default sampler;
with its default number of steps, and with the smallest one at which its C2ST is within 0.01 of that
of the default, found by bisection; scoreprior also with the smallest one at which its C2ST is no
larger than that of each of the others by default. C2ST is that of `check.c2st` with 2,000 draws,
the mean over five observations.

Seconds are those of the processor, to which waiting for other programs does not add: medians of
calls with other keys and observations, for which the packages take turns, so that what slows the
machine slows all of them. What the first call takes more is compilation. Among the evaluations for
one draw are those of twice 512 draws by which scoreprior whitens its flow, and those that sbi
rejects since they lie outside the prior.

Needs `pip install scoreprior[bench]`, and sbi and gensbi where they are to be compared: `--sbi` and
`--gensbi` take interpreters that have them, by default this one. A package that is missing is left
out, and said to be. CPU: half an hour per task. A stopped program goes on where it was.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import Progress, arguments, show, write
from sbi_tasks import simulate

from scoreprior import check

PROGRAM = Path(__file__).with_name("sampling_speed_packages.py")
LADDERS = {  # numbers of steps, the default first
    "scoreprior": (20, 16, 13, 12, 11, 10, 8, 6, 5, 4, 3),
    "sbi": (500, 350, 250, 180, 125, 90, 65, 45, 32, 27, 22, 16),
    "gensbi": (18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8),
}
TASKS = ("two_moons", "gaussian_linear")
MARGIN = 0.01
NUM_SIMULATIONS = 10_000
NUMBERS = range(1, 11)
"""Of the observations of a task."""


class Size(NamedTuple):
    """How much is measured."""

    observations: int = 5
    draws: int = 2000  # for the classifier
    total: int = 10_000
    turns: int = 3
    steps: int = 20_000  # of training
    epochs: int | None = None  # of training of sbi, at most


QUICK = Size(2, 200, 1000, 1, 200, 3)
NUM_WEIGHTS = 157_000
"""Of sbi, where scoreprior has none to compare with."""


class Package(NamedTuple):
    """A package in an interpreter that may have it."""

    name: str
    python: str

    @property
    def is_there(self) -> bool:
        """Whether the interpreter can import it."""
        command = [self.python, "-c", f"import {self.name}"]
        return not subprocess.run(command, capture_output=True, check=False).returncode

    def ask(self, folder: Path, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request."""
        done = subprocess.run(
            [self.python, str(PROGRAM), self.name, str(folder)],
            input=json.dumps({"do": do, **request}),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"},
        )
        if done.returncode:
            raise RuntimeError(f"{self.name} could not {do}:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout)


def prepare(task: str, folder: Path) -> list[np.ndarray]:
    """Write what packages learn from; return the reference draws of every observation."""
    import sbibm_jax

    found = sbibm_jax.get_task(task)
    key_theta, key_x, _ = jax.random.split(jax.random.key(NUM_SIMULATIONS), 3)
    prior = found.get_prior_dist()
    theta = prior.sample(key_theta, (NUM_SIMULATIONS,))
    x = simulate(task, found.get_simulator(key_x), key_x, theta)
    observed = [np.ravel(found.get_observation(i)) for i in NUMBERS]
    law = {"loc": prior.mean, "covariance": np.diag(prior.variance)}
    if task == "two_moons":
        law = {"low": prior.base_dist.low, "high": prior.base_dist.high}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "data.npz", theta=theta, x=x, observed=np.stack(observed), **law)
    return [np.asarray(found.get_reference_posterior_samples(i), float) for i in NUMBERS]


def accuracy(
    package: Package, folder: Path, references: list[np.ndarray], size: Size, steps: int
) -> dict[str, Any]:
    """C2ST with `steps`, and network evaluations for one draw."""
    name = f"{package.name}_{steps}.npy"
    asked = {"observations": list(range(size.observations)), "num": size.draws}
    reply = package.ask(folder, "draw", steps=steps, total=size.total, name=name, **asked)
    draws = np.load(folder / name).astype(float)
    found = [
        float(check.c2st(reference[: size.draws], drawn).attrs["accuracy"])
        for reference, drawn in zip(references, draws, strict=False)
    ]
    return {"C2ST": float(np.mean(found)), "each": found, **reply}


def fewest(ladder: tuple[int, ...], is_enough: Any) -> int:
    """The smallest number of steps that is enough, if fewer never are where more are not."""
    low, high = 0, len(ladder)  # enough at `low`, not at `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_enough(ladder[middle]) else (low, middle)
    return ladder[low]


def measure(
    task: str, packages: list[Package], size: Size, folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Rows for the default number of steps of every package, and for the fewest."""
    references, trained = prepare(task, folder), {}
    for package in packages:
        limit = size.epochs if package.name == "sbi" else size.steps
        num_weights = next((each["weights"] for each in trained.values()), NUM_WEIGHTS)
        request = {"num_steps": limit, "num_weights": num_weights}
        trained[package.name] = progress(
            f"{task}, {package.name}, training",
            size,
            lambda p=package, r=request: p.ask(folder, "train", **r),
        )

    def found(package: Package, steps: int) -> dict[str, Any]:
        compute = partial(accuracy, package, folder, references, size, steps)
        return progress(f"{task}, {package.name}, {steps} steps", size, compute)

    bars = {p: found(p, LADDERS[p.name][0])["C2ST"] for p in packages}
    rows = []
    for package, bar in bars.items():
        allowed = [bar + MARGIN]
        if package.name == "scoreprior":
            allowed += [other for other in bars.values() if other > bar]
        ladder, done = LADDERS[package.name], trained[package.name]
        least = {
            fewest(ladder, lambda n, p=package, a=most: found(p, n)["C2ST"] <= a)
            for most in allowed
        }
        for steps in sorted({ladder[0], *least}, reverse=True):
            of = {"package": package.name, "weights": done["weights"], "training": done["seconds"]}
            rows.append({**of, "steps": steps, **found(package, steps)})
    timed: list[list[dict[str, float]]] = [[] for _ in rows]
    for turn in range(size.turns):  # after all else
        for row, times in zip(rows, timed, strict=True):
            package = next(p for p in packages if p.name == row["package"])
            asked = {"steps": row["steps"], "num": size.total, "repeats": 1}
            label = f"{task}, {package.name}, {row['steps']} steps, seconds, turn {turn}"
            times.append(
                progress(label, size, lambda p=package, a=asked: p.ask(folder, "time", **a))
            )
    for row, times in zip(rows, timed, strict=True):
        row |= {name: float(np.median([one[name] for one in times])) for name in times[0]}
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "sampling_speed")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["two_moons"])
    parser.add_argument("--sbi", default=sys.executable, help="interpreter that has sbi")
    parser.add_argument("--gensbi", default=sys.executable, help="interpreter that has gensbi")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    every = [Package("scoreprior", sys.executable), Package("sbi", options.sbi)]
    every.append(Package("gensbi", options.gensbi))
    packages = [package for package in every if package.is_there]
    missing = ", ".join(package.name for package in every if package not in packages)
    print(f"missing: {missing or 'none'}", flush=True)
    size, results = QUICK if options.quick else Size(), {}
    for task in options.tasks:
        folder = (options.output.parent / f"sampling_speed_{task}").absolute()
        results[task] = measure(task, packages, size, folder, Progress(options.output))
        names = ["package", "weights", "steps", "evaluations", "C2ST", "seconds"]
        names += ["first, more", "training"]
        titles = ["package", "weights", "steps", "evaluations a draw", "C2ST", "draws, s"]
        titles += ["compilation, s", "training, s"]
        rows = [[row[name] for name in names] for row in results[task]]
        show(f"{task}: {size.total} draws", titles, rows)
    write(options.output, results)


if __name__ == "__main__":
    main()
