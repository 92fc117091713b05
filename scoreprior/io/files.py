"""A folder with `config.json` and `model.safetensors`: written whole, checked when read.

`config.json` names the format and its version and holds two SHA-256 sums, one of the description of
the prior and one of the file of arrays. So a prior that is cut short, altered or made of two halves
is told from a good one; the metadata are free to be edited. No file is unpickled. Other things than
priors are kept in the same way, each of its own `Kind`.
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

CONFIG, TENSORS = "config.json", "model.safetensors"


class Kind(NamedTuple):
    """What sort of thing a folder holds.

    `noun` names it in messages, and its description in `config.json`; `writer` is what saves it.
    """

    format: str
    version: int
    noun: str
    writer: str

    @property
    def again(self) -> str:
        return f"copy the folder again from its source, or save the {self.noun} again"


PRIOR = Kind("scoreprior.prior", 1, "prior", "scoreprior.save")


class Stored(NamedTuple):
    """What a folder holds: a description in JSON, arrays by name, metadata in JSON."""

    description: Any
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]


def write(path: Path, stored: Stored, kind: Kind = PRIOR) -> None:
    """Write the folder under another name, read it back, then put it at `path`.

    An earlier one at `path` is replaced; anything else there raises `FileExistsError`.
    """
    if path.exists() and not _is_ours(path, kind):
        raise FileExistsError(f"{path} exists and is not a saved {kind.noun}: choose another path")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    partial.mkdir(parents=True)
    try:
        _write_files(partial, stored, kind)
        if not _same(read(partial, kind).arrays, stored.arrays):
            raise OSError(f"{path} was not written faithfully: what was read back differs")
        _put(partial, path, replaced)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(path: Path, kind: Kind = PRIOR) -> Stored:
    """Read and check the folder; `ValueError` or `FileNotFoundError` says what is wrong."""
    config = read_config(path, kind)
    if _digest(_canonical(config[kind.noun])) != config["sha256"].get(kind.noun):
        raise ValueError(
            f"{path / CONFIG} was altered: its section {kind.noun!r} does not have the SHA-256 sum "
            f"stated beside it; {kind.again}"
        )
    data = _bytes(path / TENSORS, kind)
    try:
        arrays = read_tensors(data)
    except SafetensorError as error:
        raise ValueError(
            f"{path / TENSORS} cannot be read ({error}): it is truncated or no safetensors file; "
            + kind.again
        ) from error
    if _digest(data) != config["sha256"].get("arrays"):
        raise ValueError(
            f"{path / TENSORS} was altered, or belongs to another {CONFIG}: it does not have the "
            f"SHA-256 sum stated there; {kind.again}"
        )
    return Stored(config[kind.noun], arrays, config["metadata"])


def read_config(path: Path, kind: Kind = PRIOR) -> dict[str, Any]:
    """The checked `config.json`, without the arrays."""
    file = path / CONFIG
    try:
        config = json.loads(_bytes(file, kind))
    except ValueError as error:
        raise ValueError(
            f"{file} cannot be read ({error}): it is truncated; {kind.again}"
        ) from error
    if not isinstance(config, dict) or config.get("format") != kind.format:
        raise ValueError(f"{file} is not the config of a {kind.noun} saved by {kind.writer}")
    if config.get("version") != kind.version:
        raise ValueError(
            f"{file} has format version {config.get('version')!r}, and this scoreprior reads "
            f"version {kind.version}: upgrade scoreprior, or save the {kind.noun} again"
        )
    keys = ("format", "version", kind.noun, "metadata", "sha256")
    if missing := [key for key in keys if key not in config]:
        raise ValueError(f"{file} lacks the key {missing[0]!r}; {kind.again}")
    if not isinstance(config["sha256"], dict) or not isinstance(config["metadata"], dict):
        raise ValueError(f"{file} must hold objects under 'sha256' and 'metadata'; {kind.again}")
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


def _write_files(folder: Path, stored: Stored, kind: Kind) -> None:
    data = write_tensors({name: _contiguous(array) for name, array in stored.arrays.items()})
    config = {
        "format": kind.format,
        "version": kind.version,
        "metadata": stored.metadata,
        "sha256": {kind.noun: _digest(_canonical(stored.description)), "arrays": _digest(data)},
        kind.noun: stored.description,
    }
    text = json.dumps(config, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    for name, content in ((TENSORS, data), (CONFIG, text.encode())):
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _bytes(file: Path, kind: Kind) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise FileNotFoundError(
            f"{file} cannot be read ({error.strerror}): a saved {kind.noun} is a folder with "
            f"{CONFIG} and {TENSORS}"
        ) from error


def _is_ours(path: Path, kind: Kind) -> bool:
    try:
        return json.loads((path / CONFIG).read_bytes()).get("format") == kind.format
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


def plain(metadata: Mapping[str, Any], name: str = "metadata") -> dict[str, Any]:
    """`metadata` as JSON gives it back; `TypeError`, naming `name`, where it is not JSON."""
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be plain JSON, got {metadata!r} ({error})") from error


def warn_if_rounded(arrays: Mapping[str, np.ndarray]) -> str | None:
    """What to tell about arrays that the present precision of JAX cannot hold."""
    wide = [n for n, a in arrays.items() if jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype]
    if not wide:
        return None
    return (
        f"{len(wide)} arrays, {wide[0]!r} the first, are stored as {arrays[wide[0]].dtype} and are "
        'rounded: to keep them, call jax.config.update("jax_enable_x64", True) first'
    )
