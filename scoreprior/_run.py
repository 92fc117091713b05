"""Long runs in chunks: progress, checkpoints, and draws that survive an interruption.

An engine advances in compiled chunks driven from here, one after another. Every chunk ends on the
host, where its draws are kept, a checkpoint is written and Ctrl-C is heard.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from scoreprior._typing import Key, PyTree

FORMAT = "scoreprior.run/1"


class Draws(NamedTuple):
    """What an engine returns.

    `positions` [chain, draw, *shape] of `problem` by site, `stats` [chain, draw] under ArviZ's
    names, and whether the run was cut short. `extra` holds what is not one number per draw, such as
    the evidence: by name, the names of its axes, `()` for a scalar, and its values.
    """

    problem: Any
    positions: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    interrupted: bool
    extra: Mapping[str, tuple[tuple[str, ...], np.ndarray]] = MappingProxyType({})


class Chunk(NamedTuple):
    """Outputs of steps `start .. start + count`: leaves [count, ...] on the host."""

    start: int
    outputs: PyTree[np.ndarray]


class Loop(NamedTuple):
    """`num_steps` steps in chunks of `chunk_size`.

    Outputs of the first `num_discarded` are dropped. `describe(outputs)` is shown beside the
    progress bar. Where `is_finished(outputs)` can end the run before, `num_steps` is only a limit.
    """

    num_steps: int
    num_discarded: int
    chunk_size: int
    describe: Callable[[PyTree[np.ndarray]], str]
    is_finished: Callable[[PyTree[np.ndarray]], bool] | None = None


def run_first(
    first: Callable[[], Any],
    num_steps: int,
    *,
    progress: bool,
    checkpoint: "Checkpoint | None",
) -> Any:
    """The state in which a loop starts, `first()`, which takes a warm-up of `num_steps` steps.

    A warm-up has its own progress bar, which moves when it ends, and its result is stored at once.
    Where `checkpoint` holds a state already, nothing is computed, and the result is a template of
    it. Ctrl-C, which is heard when the warm-up ends, raises `KeyboardInterrupt`.
    """
    if checkpoint is not None and checkpoint.has_state:
        return jax.eval_shape(first)
    if not num_steps:
        return first()
    bar = tqdm(total=num_steps, desc="warm-up", disable=not progress, dynamic_ncols=True)
    try:
        state = jax.block_until_ready(first())
        bar.update(num_steps)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted in the warm-up, before the first draw") from None
    finally:
        bar.close()
    if checkpoint is not None:
        checkpoint.save(0, state, [])
    return state


def run_chunks(
    advance: Callable[[Any, int, int], tuple[Any, PyTree[Any]]],
    state: Any,
    loop: Loop,
    *,
    progress: bool,
    checkpoint: "Checkpoint | None",
) -> tuple[list[Chunk], Any, bool]:
    """Call `advance(state, start, count) -> (state, outputs)` until all steps are done.

    `count` is `chunk_size` but for the last call; of the outputs, leaves [chunk_size, ...], the
    first `count` rows are read. Returns the chunks that are kept, the state after them and whether
    Ctrl-C stopped the run. Any other failure is raised, with a note where a checkpoint holds what
    was done before.
    """
    done, chunks = 0, []
    if checkpoint is not None:
        done, state, chunks = checkpoint.load(state)
    is_finished = loop.is_finished or (lambda _: False)
    finished = any(is_finished(chunk.outputs) for chunk in chunks[-1:])
    total = loop.num_steps if loop.is_finished is None else None
    bar = tqdm(total=total, initial=done, disable=not progress, dynamic_ncols=True)
    try:
        while done < loop.num_steps and not finished:
            count = min(loop.chunk_size, loop.num_steps - done)
            new, outputs = advance(state, done, count)
            outputs = jax.tree.map(lambda leaf, n=count: np.asarray(leaf)[:n], outputs)
            kept = _drop(Chunk(done, outputs), loop.num_discarded)
            # In one statement, so that Ctrl-C cannot part the state from the chunks.
            state, chunks, done = new, chunks + kept, done + count
            finished = is_finished(outputs)
            if checkpoint is not None:
                checkpoint.save(done, state, kept)
            bar.set_postfix_str(loop.describe(outputs), refresh=False)
            bar.update(count)
    except KeyboardInterrupt:
        return chunks, state, True
    except Exception as error:
        if checkpoint is not None:
            error.add_note(f"{done} of {loop.num_steps} steps are kept in {checkpoint.path}")
        raise
    finally:
        bar.close()
    return chunks, state, False


def join(chunks: list[Chunk]) -> PyTree[np.ndarray]:
    """Outputs of all chunks, leaves [chain, draw, ...] from [draw, chain, ...]."""
    outputs = [chunk.outputs for chunk in chunks]
    return jax.tree.map(lambda *rows: np.concatenate(rows).swapaxes(0, 1), *outputs)


def _drop(chunk: Chunk, num_discarded: int) -> list[Chunk]:
    skip = max(num_discarded - chunk.start, 0)
    outputs = jax.tree.map(lambda leaf: leaf[skip:], chunk.outputs)
    return [Chunk(chunk.start + skip, outputs)] if len(jax.tree.leaves(outputs)[0]) else []


class Checkpoint:
    """A directory from which a killed run resumes bit for bit.

    `settings.json` says which run it is, `state.npz` holds the state after the last chunk and
    `draws-*.npz` the chunks. Files are replaced atomically and nothing is unpickled.

    **Arguments:** `path`, a directory, made if absent; `settings`, JSON values that identify the
    run. Raises `ValueError`, naming what differs, where the directory belongs to another run or
    cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.path = Path(path)
        self.settings = json.loads(json.dumps({"format": FORMAT, **settings}))
        self._check()

    @classmethod
    def of(
        cls, path: str | os.PathLike[str] | None, settings: Callable[[], Mapping[str, Any]]
    ) -> "Checkpoint | None":
        """The checkpoint at `path`; `None`, and `settings` is not called, where that is `None`."""
        return None if path is None else cls(path, settings())

    @property
    def has_state(self) -> bool:
        """Whether there is a state to resume from."""
        return (self.path / "state.npz").exists()

    def load(self, template: Any) -> tuple[int, Any, list[Chunk]]:
        """Steps done, state and chunks; 0, `template` and none where nothing is stored yet."""
        if not self.has_state:
            return 0, template, []
        stored = self._read(self.path / "state.npz")
        done, starts = int(stored["done"]), stored["starts"]
        leaves = [jnp.asarray(stored[name]) for name in _names(template)]
        state = jax.tree.unflatten(jax.tree.structure(template), leaves)
        return done, state, [self._chunk(int(start)) for start in starts]

    def save(self, done: int, state: Any, chunks: list[Chunk]) -> None:
        """Add `chunks`, then replace the state."""
        self.path.mkdir(parents=True, exist_ok=True)
        settings = self.path / "settings.json"
        if not settings.exists():
            _replace(settings, lambda file: file.write(json.dumps(self.settings).encode()))
        for chunk in chunks:
            self._starts.append(chunk.start)
            _save_arrays(self._file(chunk.start), chunk.outputs, {})
        extra = {"done": np.asarray(done), "starts": np.asarray(self._starts, int)}
        _save_arrays(self.path / "state.npz", state, extra)

    def _check(self) -> None:
        self._starts: list[int] = []
        file = self.path / "settings.json"
        if self.path.exists() and not file.exists() and any(self.path.iterdir()):
            raise ValueError(f"checkpoint {self.path} is not a checkpoint directory: {_ADVICE}")
        if not file.exists():
            return
        try:
            stored = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"checkpoint {file} cannot be read ({error}): {_ADVICE}") from error
        names = sorted(stored.keys() | self.settings.keys())
        differing = [name for name in names if stored.get(name) != self.settings.get(name)]
        if differing:
            pairs = (f"{n} ({stored.get(n)} there, {self.settings.get(n)} here)" for n in differing)
            raise ValueError(
                f"checkpoint {self.path} is of another run, it differs in {', '.join(pairs)}: "
                + _ADVICE
            )
        if self.has_state:
            self._starts = [int(start) for start in self._read(self.path / "state.npz")["starts"]]

    def _file(self, start: int) -> Path:
        return self.path / f"draws-{start:07d}.npz"

    def _chunk(self, start: int) -> Chunk:
        return Chunk(start, self._nest(self._read(self._file(start))))

    @staticmethod
    def _nest(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        nested: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            group, key = name.split("/", 1)
            nested.setdefault(group, {})[key] = array
        return nested

    def _read(self, file: Path) -> dict[str, np.ndarray]:
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                return dict(stored)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"checkpoint {file} cannot be read ({error}): {_ADVICE}") from error


_ADVICE = "pass another path, or delete it to start afresh"


def fingerprint(tree: Any) -> str:
    """SHA-256 of the arrays and plain values among the leaves of `tree`, and of their paths."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, np.ndarray | np.generic | jax.Array):
            leaf = _raw(leaf)
            digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
        elif isinstance(leaf, str | bool | int | float | complex | bytes):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def key_words(key: Key) -> list[int]:
    """The words of a random key, for a checkpoint's settings."""
    return [int(word) for word in np.ravel(_raw(key))]


def _raw(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _names(tree: Any) -> list[str]:
    """One name per leaf: its path, the parts joined by slashes."""
    paths = (path for path, _ in jax.tree.leaves_with_path(tree))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def _save_arrays(file: Path, tree: Any, extra: dict[str, np.ndarray]) -> None:
    arrays = dict(zip(_names(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))
    _replace(file, lambda handle: np.savez(handle, allow_pickle=False, **arrays, **extra))


def _replace(file: Path, write: Callable[[Any], Any]) -> None:
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as handle:
        write(handle)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)
