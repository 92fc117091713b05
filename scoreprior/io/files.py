"""A folder with `config.json` and `model.safetensors`: written whole, checked when read.

`config.json` names the format and its version and holds two SHA-256 sums, one of the description of
the prior and one of the file of arrays. So a prior that is cut short, altered or made of two halves
is told from a good one; the metadata are free to be edited. No file is unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as read_tensors
from safetensors.numpy import save as write_tensors

FORMAT = "scoreprior.prior"
VERSION = 1
CONFIG, TENSORS = "config.json", "model.safetensors"
_KEYS = ("format", "version", "prior", "metadata", "sha256")
_AGAIN = "copy the folder again from its source, or save the prior again"


class Stored(NamedTuple):
    """What a folder holds: a description in JSON, arrays by name, metadata in JSON."""

    prior: Any
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]


def write(path: Path, stored: Stored) -> None:
    """Write the folder under another name, read it back, then put it at `path`.

    An earlier prior at `path` is replaced; anything else there raises `FileExistsError`.
    """
    if path.exists() and not _is_ours(path):
        raise FileExistsError(f"{path} exists and is not a saved prior: choose another path")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    partial.mkdir(parents=True)
    try:
        _write_files(partial, stored)
        if not _same(read(partial).arrays, stored.arrays):
            raise OSError(f"{path} was not written faithfully: what was read back differs")
        _put(partial, path, replaced)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(path: Path) -> Stored:
    """Read and check the folder; `ValueError` or `FileNotFoundError` says what is wrong."""
    config = read_config(path)
    if _digest(_canonical(config["prior"])) != config["sha256"].get("prior"):
        raise ValueError(
            f"{path / CONFIG} was altered: its section 'prior' does not have the SHA-256 sum "
            f"stated beside it; {_AGAIN}"
        )
    data = _bytes(path / TENSORS)
    try:
        arrays = read_tensors(data)
    except SafetensorError as error:
        raise ValueError(
            f"{path / TENSORS} cannot be read ({error}): it is truncated or no safetensors file; "
            + _AGAIN
        ) from error
    if _digest(data) != config["sha256"].get("arrays"):
        raise ValueError(
            f"{path / TENSORS} was altered, or belongs to another {CONFIG}: it does not have the "
            f"SHA-256 sum stated there; {_AGAIN}"
        )
    return Stored(config["prior"], arrays, config["metadata"])


def read_config(path: Path) -> dict[str, Any]:
    """The checked `config.json`, without the arrays."""
    file = path / CONFIG
    try:
        config = json.loads(_bytes(file))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): it is truncated; {_AGAIN}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{file} is not the config of a prior saved by scoreprior.save")
    if config.get("version") != VERSION:
        raise ValueError(
            f"{file} has format version {config.get('version')!r}, and this scoreprior reads "
            f"version {VERSION}: upgrade scoreprior, or save the prior again"
        )
    if missing := [key for key in _KEYS if key not in config]:
        raise ValueError(f"{file} lacks the key {missing[0]!r}; {_AGAIN}")
    if not isinstance(config["sha256"], dict) or not isinstance(config["metadata"], dict):
        raise ValueError(f"{file} must hold objects under 'sha256' and 'metadata'; {_AGAIN}")
    return config


def _put(new: Path, path: Path, earlier: Path) -> None:
    """Put the folder `new` at `path`; what was there waits at `earlier`, and returns on failure."""
    try:
        if path.exists():
            path.rename(earlier)
        new.rename(path)
    except BaseException:
        if earlier.exists() and not path.exists():
            earlier.rename(path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _write_files(folder: Path, stored: Stored) -> None:
    data = write_tensors({name: _contiguous(array) for name, array in stored.arrays.items()})
    config = {
        "format": FORMAT,
        "version": VERSION,
        "metadata": stored.metadata,
        "sha256": {"prior": _digest(_canonical(stored.prior)), "arrays": _digest(data)},
        "prior": stored.prior,
    }
    text = json.dumps(config, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    for name, content in ((TENSORS, data), (CONFIG, text.encode())):
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise FileNotFoundError(
            f"{file} cannot be read ({error.strerror}): a saved prior is a folder with {CONFIG} "
            f"and {TENSORS}"
        ) from error


def _is_ours(path: Path) -> bool:
    try:
        return json.loads((path / CONFIG).read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _canonical(config: Any) -> bytes:
    return json.dumps(config, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _contiguous(array: np.ndarray) -> np.ndarray:
    # safetensors writes strided arrays wrongly; ascontiguousarray alone would make scalars vectors.
    return np.ascontiguousarray(array).reshape(array.shape)


def _same(read: Mapping[str, np.ndarray], written: Mapping[str, np.ndarray]) -> bool:
    def equal(a: np.ndarray, b: np.ndarray) -> bool:
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

    return read.keys() == written.keys() and all(equal(read[n], written[n]) for n in written)


def plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` as JSON gives it back; `TypeError` where it is not JSON."""
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be plain JSON, got {metadata!r} ({error})") from error


def warn_if_rounded(arrays: Mapping[str, np.ndarray]) -> str | None:
    """What to tell about arrays that the present precision of JAX cannot hold."""
    wide = [n for n, a in arrays.items() if jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype]
    if not wide:
        return None
    return (
        f"{len(wide)} arrays, {wide[0]!r} the first, are stored as {arrays[wide[0]].dtype} and are "
        'rounded: to keep them, call jax.config.update("jax_enable_x64", True) first'
    )
