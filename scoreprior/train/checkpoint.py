"""Checkpoints of a run: safetensors with the settings beside them, written atomically.

A file holds every array of the training state under its path in the state, and the settings of the
run as JSON. Nothing is unpickled. A run resumes only from a file of the same settings and shapes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "scoreprior.train/2"
VERSIONS = f"jax {jax.__version__}, optax {optax.__version__}, equinox {eqx.__version__}"


def write(path: Path, state: Any, settings: Mapping[str, Any]) -> None:
    """Replace the file at `path` by one with `state`, a pytree of arrays, and JSON `settings`."""
    tensors = {name: _contiguous(leaf) for name, leaf in _named(state).items()}
    described = json.dumps(dict(settings), sort_keys=True)
    metadata = {"format": FORMAT, "versions": VERSIONS, "settings": described}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read(path: Path, template: Any, settings: Mapping[str, Any]) -> Any:
    """The state at `path`, with the structure, shapes and types of `template`.

    Raises `ValueError` naming what differs when the file is unreadable or of another run.
    """
    advice = "pass another checkpoint path, or delete the file to start afresh"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error}); {advice}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {metadata.get('format')!r}, not {FORMAT!r}; {advice}"
        )
    if metadata["versions"] != VERSIONS:
        there = f"it was written with {metadata['versions']}, which may describe the same run "
        advice = f"{there}otherwise than {VERSIONS} here; {advice}"
    _compare_settings(path, json.loads(metadata["settings"]), dict(settings), advice)
    return _fill(path, template, tensors, advice)


def _compare_settings(path: Path, stored: dict, settings: dict, advice: str) -> None:
    settings = json.loads(json.dumps(settings))
    differing = [
        f"{name} ({stored.get(name)!r} there, {settings.get(name)!r} here)"
        for name in sorted(stored.keys() | settings.keys())
        if stored.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"checkpoint {path} is of another run, it differs in: {'; '.join(differing)}; {advice}"
        )


def _fill(path: Path, template: Any, tensors: dict[str, np.ndarray], advice: str) -> Any:
    expected = _named(template)
    if missing := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(
            f"checkpoint {path} and this run do not hold the same arrays, first difference "
            f"{missing[0]!r}; {advice}"
        )
    for name, leaf in expected.items():
        there, here = tensors[name], jnp.asarray(leaf)
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            raise ValueError(
                f"checkpoint {path} holds {name!r} as {there.dtype}{list(there.shape)}, this run "
                f"needs {here.dtype}{list(here.shape)}; {advice}"
            )
    leaves = [jnp.asarray(tensors[name]) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _contiguous(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    # safetensors writes strided arrays wrongly; ascontiguousarray alone would make scalars vectors.
    return np.ascontiguousarray(array).reshape(array.shape)
