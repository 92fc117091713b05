"""What makes two runs of training the same run, as plain JSON.

Arrays are told apart by a checksum of their bytes. A function, the optimiser's update for one, is
told apart by the program that JAX lowers it to, constants and captured arrays included. Programs
are those of the platform at hand, so a run resumes where it began; functions called back on the
host are out of JAX's sight and do not count. Nothing here depends on the process.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from scoreprior._typing import Key, Scalar
from scoreprior.train.state import Data, Run, State

ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


def identity(run: Run, start: State, num_steps: int, evaluate_every: int) -> dict[str, Any]:
    """What must agree for a run to be resumed; `start` is its state before the first step."""
    parts = {
        "loss": run.loss,
        "dequantise": run.dequantise,
        "augment": run.augment,
        "augment_context": run.augment_context,
    }
    frozen = run.build(jax.tree.map(lambda _: None, run.params()))
    return {
        "platform": jax.default_backend(),
        "num_steps": num_steps,
        "evaluate_every": evaluate_every,
        "batch_size": run.batch_size,
        "averaging": run.averaging,
        "num_held_out_draws": run.num_held_out_draws,
        "key": np.asarray(jax.random.key_data(run.key)).tolist(),
        "data": digest(run.data),
        "held_out": digest(run.held_out),
        "initial weights": digest(run.params()),
        "denoiser": described(run.denoiser),
        "frozen arrays of denoiser": digest(frozen),
        **{name: described(part) for name, part in parts.items()},
        **{f"arrays of {name}": digest(part) for name, part in parts.items()},
        **{f"program of {name}": value for name, value in _programs(run, start).items()},
        "optimiser": _optimiser(run, start),
    }


def digest(tree: PyTree) -> str:
    """Checksum of the bytes, types, shapes and places of all arrays of a tree."""
    checksum = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.Array | np.ndarray | np.generic):
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            array = np.asarray(leaf)
            place = f"{jax.tree_util.keystr(path)}:{array.dtype}{array.shape};"
            checksum.update(place.encode() + array.tobytes())
    return checksum.hexdigest()[:16]


def program(function: Callable[..., Any], *arguments: Any) -> str:
    """Checksum of the StableHLO text of `function(*arguments)`, constants included.

    Arrays among the arguments, and within a function that is a pytree, count by shape only.
    """
    jitted: Any = eqx.filter_jit(_call)
    lowered = jitted.lower(function, arguments)
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


def described(value: Any) -> str:
    """Classes, settings and shapes. Every field is written, whether it holds its default or not."""
    if isinstance(value, eqx.Module):
        names = [field.name for field in dataclasses.fields(value)]
        parts = (f"{name}={described(getattr(value, name, None))}" for name in names)
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(described, value))})"
    return ADDRESS.sub("0x", eqx.tree_pformat(value, width=1_000_000))


def _programs(run: Run, start: State) -> dict[str, str]:
    """Programs of the parts at one event; that of the loss includes the denoiser's."""
    event = jax.tree.map(lambda leaf: leaf[0], run.data)
    blank = eqx.tree_at(lambda r: (r.data, r.held_out), run, (None, None), is_leaf=_is_none)
    u = jnp.full((), 0.5, event.x.dtype)
    # Maps may change the shape of an event, and have programs of their own.
    augmented = _like(eqx.filter_eval_shape(run.augment, run.key, event.x))
    given = _like(eqx.filter_eval_shape(run.dequantise, run.key, augmented))
    return {
        "loss": program(_gradient, blank, start.params, event._replace(x=given), u, run.key),
        "dequantise": program(run.dequantise, run.key, augmented),
        "augment": program(run.augment, run.key, event.x),
        "augment_context": program(run.augment_context, run.key, event.context),
    }


def _gradient(run: Run, params: PyTree, event: Data, u: Scalar, key: Key) -> tuple[Scalar, PyTree]:
    def loss(params: PyTree) -> Scalar:
        return run.loss(run.build(params), event.x, u, event.context, key=key)

    return jax.value_and_grad(loss)(params)


def _optimiser(run: Run, start: State) -> str:
    """The update's program, and the first state, where some optimisers keep their settings."""
    update = program(run.optimiser.update, start.params, start.optimiser, start.params)
    return f"update {update}, initial state {digest(start.optimiser)}"


def _like(shape: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _is_none(value: Any) -> bool:
    return value is None
