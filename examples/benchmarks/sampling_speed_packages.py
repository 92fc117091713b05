"""Training and drawing with one package: the part of `sampling_speed.py` that it starts.

    python sampling_speed_packages.py PACKAGE FOLDER < request.json

It answers one request, `train`, `draw` or `time`, by a line of JSON, and needs NumPy and that
package only, so that every package may have an interpreter of its own. `FOLDER/data.npz` holds
`theta` [n, d] and `x` [n, m] of training, `observed` [k, m], and the prior, by `low` and `high` or
by `loc` and `covariance`.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 256
"""Of scoreprior, by default, and of gensbi; sbi has a default of its own."""


class Scoreprior:
    """The default `sbi.NPSE`."""

    def __init__(self, folder: Path, data: Any):
        import numpyro.distributions as dist

        self.path, self.data = folder / "scoreprior", data
        if "low" in data:
            self.prior = dist.Uniform(data["low"], data["high"]).to_event(1)
        else:
            self.prior = dist.MultivariateNormal(data["loc"], data["covariance"])

    def train(self, num_steps: int, num_weights: int | None) -> None:
        import jax

        from scoreprior import sbi

        inference = sbi.NPSE(self.prior, (self.data["theta"], self.data["x"]))
        posterior = inference.fit(
            key=jax.random.key(0), num_steps=num_steps, batch_size=BATCH_SIZE, progress=False
        )
        posterior.save(self.path)

    def load(self) -> dict[str, float]:
        import jax

        from scoreprior import sbi

        self.posterior = sbi.Posterior.load(self.path, self.prior)
        mlp = self.posterior.denoiser.net.mlp  # type: ignore[attr-defined]
        return {"weights": sum(np.size(leaf) for leaf in jax.tree.leaves(mlp))}

    def sample(self, seed: int, x: np.ndarray, num: int, steps: int) -> np.ndarray:
        import jax

        from scoreprior.sbi.posterior import default_solver

        posterior = self.posterior
        solver = default_solver(posterior.moments, posterior.sigma_min)
        if steps != solver.num_steps:
            solver = dataclasses.replace(solver, num_steps=steps)
            posterior = dataclasses.replace(posterior, solver=solver)
        return np.asarray(posterior.sample(jax.random.key(seed), x, num))

    def evaluations(self, x: np.ndarray, num: int, steps: int) -> float:
        from scoreprior.sbi.posterior import NUM_PILOT

        return (steps + 2) * (1 + 2 * NUM_PILOT / num)


class Sbi:
    """`NPSE` of sbi with its perceptron, which is as wide as has `num_weights`."""

    def __init__(self, folder: Path, data: Any):
        import torch
        from sbi.utils import BoxUniform

        torch.set_num_threads(1)
        names = ("low", "high") if "low" in data else ("loc", "covariance")
        law = BoxUniform if "low" in data else torch.distributions.MultivariateNormal
        self.prior = law(*(torch.tensor(data[name]).float() for name in names))
        self.path, self.data = folder / "sbi.pt", data

    def train(self, num_steps: int | None, num_weights: int) -> None:
        import torch
        from sbi.inference import NPSE
        from sbi.neural_nets import posterior_score_nn

        theta, x = (torch.tensor(self.data[name]).float() for name in ("theta", "x"))

        def excess(width: int) -> int:
            network = posterior_score_nn("mlp", hidden_features=width)(theta, x)
            return abs(_num_trained(network) - num_weights)

        width = min(range(100, 201), key=excess)
        torch.manual_seed(0)
        network = posterior_score_nn("mlp", hidden_features=width)
        inference = NPSE(self.prior, vf_estimator=network, show_progress_bars=False)
        limit = {} if num_steps is None else {"max_num_epochs": num_steps}
        torch.save(inference.append_simulations(theta, x).train(**limit), self.path)

    def load(self) -> dict[str, float]:
        import torch
        from sbi.inference import NPSE

        network = torch.load(self.path, weights_only=False)
        self.posterior = NPSE(self.prior).build_posterior(network)
        return {"weights": _num_trained(network)}

    def sample(self, seed: int, x: np.ndarray, num: int, steps: int) -> np.ndarray:
        import torch

        torch.manual_seed(seed)
        x_o = torch.tensor(x).float()
        draws = self.posterior.sample((num,), x_o, steps=steps, show_progress_bars=False)
        return draws.numpy()

    def evaluations(self, x: np.ndarray, num: int, steps: int) -> float:
        """Counted over 1,000 draws: those outside the prior are drawn again."""
        rows: list[int] = []
        network = self.posterior.vector_field_estimator.net
        hook = network.output_layer.register_forward_hook(
            lambda layer, inputs, output: rows.append(output.numel() // output.shape[-1])
        )
        self.sample(0, x, 1000, steps)
        hook.remove()
        return sum(rows) / 1000


def _num_trained(network: Any) -> int:
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


class GenSBI:
    """EDM diffusion of gensbi with the network of scoreprior, rewritten in Flax.

    Parameters and data are standardised, as gensbi asks for.
    """

    def __init__(self, folder: Path, data: Any):
        import jax.numpy as jnp
        import sampling_speed_flax
        from flax import nnx
        from gensbi.core import DiffusionEDMMethod
        from gensbi.recipes import ConditionalPipeline

        self.path = folder / "gensbi.npz"
        theta, x = data["theta"], data["x"]
        self.moments = {"theta": (theta.mean(0), theta.std(0)), "x": (x.mean(0), x.std(0))}
        pairs = [jnp.asarray(self._standard(name, data[name])) for name in ("theta", "x")]
        num_held_out = len(theta) // 10
        settings = ConditionalPipeline.get_default_training_config()
        settings |= {"max_lr": 1e-3, "checkpoint_dir": str(folder / "gensbi")}
        sizes = theta.shape[1], x.shape[1]
        self.pipeline = ConditionalPipeline(
            sampling_speed_flax.ResidualMLP(*sizes, rngs=nnx.Rngs(0)),
            _batches([each[num_held_out:] for each in pairs], BATCH_SIZE),
            _batches([each[:num_held_out] for each in pairs], num_held_out),
            *sizes,
            DiffusionEDMMethod(),
            training_config=settings,
        )
        self.samplers: dict[int, Any] = {}

    def train(self, num_steps: int, num_weights: int | None) -> None:
        import jax
        from flax import nnx

        self.pipeline.update_training_config({"nsteps": num_steps})
        self.pipeline.train(nnx.Rngs(0), save_model=False)
        weights = nnx.state(self.pipeline.ema_model, nnx.Param)
        np.savez(self.path, *jax.tree.leaves(weights))

    def load(self) -> dict[str, float]:
        import jax
        from flax import nnx

        model = self.pipeline.ema_model
        structure = jax.tree.structure(nnx.state(model, nnx.Param))
        leaves = list(np.load(self.path).values())
        nnx.update(model, jax.tree.unflatten(structure, leaves))
        model.eval()
        self.pipeline._wrap_model()
        return {"weights": sum(np.size(leaf) for leaf in leaves)}

    def sample(self, seed: int, x: np.ndarray, num: int, steps: int) -> np.ndarray:
        import jax
        import jax.numpy as jnp

        x = self._standard("x", x[None])
        if steps not in self.samplers:
            self.samplers[steps] = self.pipeline.get_sampler(x, nsteps=steps)
        # Another observation is an argument of the compiled sampler.
        ids = {"obs_ids": self.pipeline.obs_ids, "cond_ids": self.pipeline.cond_ids}
        drawn = self.samplers[steps](jax.random.key(seed), num, {"cond": jnp.asarray(x), **ids})
        mean, scale = self.moments["theta"]
        return mean + scale * np.asarray(drawn)[:, :, 0]

    def evaluations(self, x: np.ndarray, num: int, steps: int) -> float:
        return 2 * steps - 1

    def _standard(self, name: str, values: np.ndarray) -> np.ndarray:
        mean, scale = self.moments[name]
        return ((values - mean) / scale).astype(np.float32)[..., None]


def _batches(pairs: list[Any], size: int) -> Iterator[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    while True:
        rows = rng.choice(len(pairs[0]), size, replace=False)
        yield pairs[0][rows], pairs[1][rows]


PACKAGES = {"scoreprior": Scoreprior, "sbi": Sbi, "gensbi": GenSBI}


def answer(package: Any, request: dict[str, Any], folder: Path, observed: np.ndarray) -> Any:
    """What was asked for."""
    if request["do"] == "train":
        before = time.perf_counter(), time.process_time()
        package.train(request["num_steps"], request["num_weights"])
        after = time.perf_counter(), time.process_time()
        return package.load() | {"seconds": after[1] - before[1], "wall": after[0] - before[0]}
    package.load()
    steps, num = request["steps"], request["num"]
    if request["do"] == "draw":
        draws = [package.sample(1 + i, observed[i], num, steps) for i in request["observations"]]
        np.save(folder / request["name"], np.stack(draws))
        return {"evaluations": package.evaluations(observed[0], request["total"], steps)}
    seconds, wall = [], []
    for i in range(1 + request["repeats"]):
        before = time.perf_counter(), time.process_time()
        package.sample(i, observed[i], num, steps)
        after = time.perf_counter(), time.process_time()
        wall.append(after[0] - before[0])
        seconds.append(after[1] - before[1])
    median = statistics.median(seconds[1:])
    first = {"first, more": seconds[0] - median}
    return {"seconds": median, "wall": statistics.median(wall[1:]), **first}


def main() -> None:
    """Answer one request."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    data = dict(np.load(folder / "data.npz"))
    with contextlib.redirect_stdout(sys.stderr):  # packages print, too
        package = PACKAGES[name](folder, data)
        reply = answer(package, json.load(sys.stdin), folder, data["observed"])
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
