"""Checkpoints of training: exact resumption, and refusal of every other run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from scoreprior.denoise.network import Network
from scoreprior.gaussian import Moments
from scoreprior.train import DenoisingLoss, LogUniform, Residual, TargetScore, adamw, fit
from scoreprior.train import checkpoint as files
from scoreprior.train.identity import program
from training import LOSS, MIXTURE, MIXTURE_MOMENTS, draws, mlp_denoiser, quick

RESUME = """
import sys
from safetensors.numpy import save_file
from test_train_checkpoint import resumable, weights

save_file(weights(resumable(sys.argv[1])), sys.argv[2])
"""


def resumable(checkpoint):
    return fit(
        mlp_denoiser(width=16),
        draws(MIXTURE, 256),
        LOSS,
        key=jax.random.key(3),
        num_steps=400,
        batch_size=64,
        held_out=draws(MIXTURE, 64),
        evaluate_every=20,
        checkpoint=checkpoint,
        progress=False,
    )


def weights(result):
    leaves = jax.tree.leaves(result.denoiser.net)
    return {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}


def launch(script, *arguments):
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "JAX_ENABLE_X64": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    checkpoint, killed, resumed = (tmp_path / name for name in ("run.safetensors", "a", "b"))
    whole = weights(resumable(tmp_path / "whole.safetensors"))
    process = launch(RESUME, checkpoint, killed)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    with safe_open(checkpoint, framework="numpy") as file:
        assert 0 < file.get_tensor(".step") < 400
    process = launch(RESUME, checkpoint, resumed)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    again = load_file(resumed)
    assert again.keys() == whole.keys()
    assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)
    start = jax.tree.leaves(mlp_denoiser(width=16).net)
    assert any(not np.array_equal(whole[str(i)], leaf) for i, leaf in enumerate(start))


def test_checkpoints_of_other_runs_and_broken_ones_are_refused(tmp_path):
    path, data = tmp_path / "run.safetensors", draws(MIXTURE, 64)
    quick(mlp_denoiser(), data, checkpoint=path)
    with pytest.raises(ValueError, match=r"differs in: batch_size \(32 there, 16 here\); pass"):
        quick(mlp_denoiser(), data, checkpoint=path, batch_size=16)
    with pytest.raises(ValueError, match=r"differs in: data \([^;]*\); pass"):
        quick(mlp_denoiser(), data + 1, checkpoint=path)
    again = quick(mlp_denoiser(), data, checkpoint=path)  # a finished run is simply read
    assert again.history.step.tolist() == [10, 20, 30, 40]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        quick(mlp_denoiser(), data, checkpoint=path)


def test_a_file_of_other_arrays_or_another_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    files.write(path, {"a": jnp.zeros(2)}, {})
    with pytest.raises(ValueError, match=r"not hold the same arrays, first difference \"\['a'\]\""):
        files.read(path, {"b": jnp.zeros(2)}, {})
    with pytest.raises(ValueError, match=r"holds \"\['a'\]\" as float64\[2\], this run .*\[3\]"):
        files.read(path, {"a": jnp.zeros(3)}, {})
    monkeypatch.setattr(files, "FORMAT", "scoreprior.train/0")
    with pytest.raises(ValueError, match="has format 'scoreprior.train/2', not .*/0'"):
        files.read(path, {"a": jnp.zeros(2)}, {})


class Unit(eqx.Module):
    """A network of one weight; JAX's own functions print with their address in memory."""

    weight: jax.Array
    activation: Callable = jax.nn.silu

    def __call__(self, x, log_sigma, context):
        return self.weight * self.activation(x)


class Offset(eqx.Module):
    """A transform that holds an array."""

    amount: jax.Array

    def __call__(self, key, x):
        return x + self.amount


def offset_by(amount):
    """A transform that captures an array."""
    return lambda key, x: x + amount


def pulled_to(centre):
    score = TargetScore(lambda x: centre - x, spread=1.0)
    return DenoisingLoss(LogUniform(0.05, 20.0), Residual(MIXTURE_MOMENTS), score)


OTHER_MOMENTS = Moments(jnp.array([0.1, -0.3]), jnp.array([3.04, 1.06]))
CENTRE = jnp.array([0.5, 0.0])


def tiny(path, *, moments=MIXTURE_MOMENTS, **changes):
    options = {
        "loss": pulled_to(CENTRE),
        "num_steps": 2,
        "evaluate_every": 1,
        "optimiser": adamw(2),
        "dequantise": Offset(jnp.zeros(2)),
        "augment": offset_by(jnp.zeros(2)),
        "augment_context": Offset(jnp.zeros(2)),
        "context": jnp.ones((16, 2)),
    }
    denoiser = Network(Unit(jnp.ones(())), moments)
    return quick(denoiser, draws(MIXTURE, 16), checkpoint=path, **(options | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a finished run."""
    path = tmp_path_factory.mktemp("train") / "run.safetensors"
    tiny(path)
    return path


def other_metric():
    return eqx.tree_at(lambda loss: loss.metric.moments, pulled_to(CENTRE), OTHER_MOMENTS)


def unclipped():
    return optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 1e-3, 1, 2, 1e-5), b2=0.99, weight_decay=0.01
    )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"moments": OTHER_MOMENTS}, "frozen arrays of denoiser"),
        ({"loss": other_metric()}, "arrays of loss"),
        ({"loss": pulled_to(CENTRE + 1)}, "program of loss"),
        ({"dequantise": Offset(jnp.ones(2))}, "arrays of dequantise"),
        ({"augment": offset_by(jnp.ones(2))}, "program of augment"),
        ({"augment_context": Offset(jnp.ones(2))}, "arrays of augment_context"),
        ({"optimiser": adamw(2, peak=2e-3)}, "optimiser"),
        ({"optimiser": adamw(2, weight_decay=0.02)}, "optimiser"),
        ({"optimiser": adamw(2, num_warmup=0)}, "optimiser"),
        ({"optimiser": optax.chain(optax.clip_by_global_norm(2.0), unclipped())}, "optimiser"),
        ({"optimiser": optax.sgd(1e-3)}, "optimiser"),
    ],
)
def test_what_a_run_does_not_train_must_agree_too(finished, changes, name):
    """Arrays bit for bit, held or captured, and the optimiser's settings; only what differs."""
    with pytest.raises(ValueError, match=rf"it differs in: {name} \([^;]*\); pass another"):
        tiny(finished, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": optax.chain(optax.clip_by_global_norm(1.0), unclipped())},
        {"loss": jax.tree.map(lambda leaf: leaf, pulled_to(CENTRE))},  # defaults that are copies
    ],
    ids=["optimiser", "loss"],
)
def test_the_same_run_otherwise_put_together_is_accepted(finished, changes):
    assert tiny(finished, **changes).history.step.tolist() == [1, 2]


def test_settings_in_the_optimisers_state_must_agree(tmp_path):
    """`inject_hyperparams` keeps the learning rate among the arrays that a checkpoint restores."""
    path, make = tmp_path / "run.safetensors", optax.inject_hyperparams(optax.sgd)
    tiny(path, optimiser=make(learning_rate=1e-3))
    tiny(path, optimiser=make(learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"differs in: optimiser \("):
        tiny(path, optimiser=make(learning_rate=2e-3))


def test_other_versions_are_named_with_what_differs(finished, monkeypatch):
    written = files.VERSIONS
    monkeypatch.setattr(files, "VERSIONS", "jax 99")
    assert tiny(finished).best_step == 2
    with pytest.raises(ValueError, match=f"optimiser .*; it was written with {written}.*jax 99 he"):
        tiny(finished, optimiser=adamw(2, peak=2e-3))


def test_a_run_resumes_on_the_platform_where_it_began(finished, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match=r"differs in: platform \('\w+' there, 'tpu' here\); pass"):
        tiny(finished)


TELL_APART = """
import sys
from scoreprior.train import adamw
from test_train_checkpoint import tiny

print(tiny(sys.argv[1]).best_step)
try:
    tiny(sys.argv[1], optimiser=adamw(2, peak=2e-3))
except ValueError as error:
    print(error)
"""


def test_a_fresh_process_tells_runs_apart(finished):
    """No address in memory, no order of a set and no trace made before enters the comparison."""
    output, errors = launch(TELL_APART, finished).communicate()
    accepted, refused = output.splitlines() or [errors, ""]
    assert accepted == "2", errors
    assert "it differs in: optimiser (" in refused


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x * 1.0, lambda x: x * (1.0 + 2e-16)),
        (lambda x: x + np.arange(3.0), lambda x: x + np.arange(3.0)[::-1]),
        (lambda x: jax.jit(lambda y: y + 1.0)(x), lambda x: jax.jit(lambda y: y - 1.0)(x)),
        (lambda x: x - x[::-1], lambda x: x[::-1] - x),
        (lambda x: jax.lax.map(jnp.sin, x), lambda x: jax.lax.map(jnp.cos, x)),
    ],
    ids=["literal", "constant", "inner", "order", "loop"],
)
def test_programs_are_told_apart(one, other):
    x = jnp.ones(3)
    assert program(one, x) == program(one, 2 * x)
    assert program(one, x) != program(other, x)


def test_a_function_on_the_host_does_not_count():
    """Neither its code, which JAX does not see, nor its address, which no two processes share."""

    def lowered(function):
        return program(lambda x: jax.pure_callback(function, x, x), jnp.ones(3))

    assert lowered(np.sin) == lowered(np.cos)
