"""Where simulations are kept: a table in memory, and a Zarr group on disk that follows it.

Draw `i` has row `i` of every array, so that the order in which draws arrive leaves no trace. Rows
of `status` are written after those of `x` that they speak of, and files are replaced atomically (by
Zarr from 3.1.3 on): after a kill every row whose status is not `PENDING` is whole. Arrays are
written now and then, and what arrives in between goes into a `Journal` at once.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import PyTree

from scoreprior.sbi.journal import Arrived, Journal
from scoreprior.sbi.worker import Status

FORMAT = "scoreprior.simulations/1"
NUM_MESSAGES = 10
CHUNK_BYTES = 2**18
CHUNK_ROWS = 1024
SHARE_OF_TIME = 0.1
JOURNAL = "arrived"


class Table:
    """Every draw of a run: `theta` [num, ...], `x` [num, *x] once a shape is known, `status`."""

    def __init__(self, theta: PyTree[np.ndarray], num: int):
        self.theta = theta
        self.status = np.zeros(num, np.uint8)
        self.x: np.ndarray | None = None
        self.messages: dict[int, str] = {}

    def add(self, arrived: Arrived) -> None:
        """Fill in rows; an `x` with NaN or infinity makes its status `NOT_FINITE`."""
        status = np.array(arrived.status, np.uint8)
        if arrived.x is not None:
            if self.x is None:
                blank = (len(self.status), *arrived.x.shape[1:])
                self.x = np.full(blank, np.nan, arrived.x.dtype)
            finite = np.isfinite(arrived.x).reshape(len(status), -1).all(1)
            status[(status == Status.DONE) & ~finite] = Status.NOT_FINITE
            self.x[arrived.draws] = arrived.x
        self.messages |= arrived.messages
        # Last, so that a row that Ctrl-C leaves half filled still counts as pending.
        self.status[arrived.draws] = status

    @property
    def pending(self) -> np.ndarray:
        """Draws still to be made."""
        return np.flatnonzero(self.status == Status.PENDING)

    def count(self, status: Status) -> int:
        """How many draws are of this status."""
        return int((self.status == status).sum())

    @property
    def num_done(self) -> int:
        """Draws with an `x`."""
        return self.count(Status.DONE)

    @property
    def num_left_out(self) -> int:
        """Draws that failed, in whatever way."""
        return int((self.status > Status.DONE).sum())


class Store:
    """The Zarr group at `path` of a table whose run is `identity`.

    Raises `ValueError`, naming what differs, where the path holds another run or something else.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], table: Table):
        self.path = path
        self._table = table
        self._dirty: list[np.ndarray] = []
        self._next_flush = 0.0
        self._journal = Journal(path / JOURNAL)
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            self._group = _open(path, "r+")
            _check_identity(path, dict(self._group.attrs), identity)
            self._settle()
            _restore(self._group, table)
        else:
            attributes = {**identity, "num": 0, "messages": {}}
            self._group = zarr().create_group(path, attributes=attributes)
        self._grow()

    def add(self, arrived: Arrived) -> None:
        """Write what arrived into the journal, and into arrays where that has not taken long."""
        self._journal.add(arrived)
        self._dirty.append(arrived.draws)
        if time.perf_counter() >= self._next_flush:
            self.flush()

    def flush(self) -> None:
        """Write every row that changed; Zarr's chunks are written whole, and none is read."""
        if not self._dirty:
            return
        start, rows = time.perf_counter(), np.concatenate(self._dirty)
        table = self._table
        if table.x is not None:
            _write(self._array("x", table.x), table.x, rows)
        known = {int(i): text for i, text in self._group.attrs["messages"].items()}
        messages = _first(known | table.messages)
        if messages != known:
            self._group.attrs["messages"] = {str(i): text for i, text in messages.items()}
        _write(self._array("status", table.status), table.status, rows)
        self._dirty.clear()
        self._journal.clear()
        end = time.perf_counter()
        self._next_flush = end + (end - start) / SHARE_OF_TIME

    def _settle(self) -> None:
        """Write the arrays of what a killed run has left in the journal."""
        self._dirty = [arrived.draws for arrived in self._journal]
        if self._dirty:
            table, self._table = self._table, read(self.path)
            self.flush()
            self._table = table
        self._journal.clear()  # of a last record that was cut short

    def _grow(self) -> None:
        num, before = len(self._table.status), int(self._group.attrs["num"])
        if num <= before:
            return
        rows = np.arange(before, num)
        for place, leaf in _places(self._table.theta).items():
            _write(self._array(place, leaf), leaf, rows)
        if self._table.x is not None:
            self._array("x", self._table.x)
        self._array("status", self._table.status)
        self._group.attrs["num"] = num

    def _array(self, place: str, values: np.ndarray) -> Any:
        """The array at `place`, with rows for all `values`."""
        if place not in self._group:
            row_bytes = max(values[0].nbytes, 1)
            chunk = int(np.clip(CHUNK_BYTES // row_bytes, 1, CHUNK_ROWS))
            return self._group.create_array(
                place,
                shape=(max(len(values), int(self._group.attrs["num"])), *values.shape[1:]),
                dtype=values.dtype,
                chunks=(chunk, *(max(size, 1) for size in values.shape[1:])),
                fill_value=np.nan if np.issubdtype(values.dtype, np.floating) else 0,
            )
        array = self._group[place]
        if array.shape[0] < len(values):
            array.resize(values.shape)
        return array


def read(path: str | os.PathLike[str]) -> Table:
    """The table of a store; raises `ValueError` where there is none."""
    group = _open(Path(path), "r")
    num, places = int(group.attrs["num"]), group.attrs["theta"]
    leaves = {name: group[_place(name)][:num] for name in places}
    theta = leaves[""] if list(places) == [""] else leaves
    table = Table(theta, num)
    noted = list(Journal(Path(path) / JOURNAL))  # before the arrays, which a run may be writing
    _restore(group, table)
    for arrived in noted:
        table.add(arrived)
    return table


def describe_theta(theta: PyTree[np.ndarray]) -> dict[str, Any]:
    """Sites with their shapes and types, as JSON; an array is a site without a name."""
    sites = theta if isinstance(theta, dict) else {"": theta}
    return {name: [list(leaf.shape[1:]), str(leaf.dtype)] for name, leaf in sites.items()}


def zarr() -> Any:
    """The package, an extra; raises `ImportError`, naming the extra, where it is missing."""
    try:
        import zarr
    except ImportError as error:
        raise ImportError("store needs Zarr: pip install 'scoreprior[sbi]'") from error
    return zarr


def _restore(group: Any, table: Table) -> None:
    """Fill in what is stored, of as many draws as the table has; theta is that of the store."""
    num = min(int(group.attrs["num"]), len(table.status))
    if num == 0:
        return
    for place, leaf in _places(table.theta).items():
        leaf[:num] = group[place][:num]
    table.status[:num] = group["status"][:num]
    if "x" in group:
        stored = group["x"]
        table.x = np.full((len(table.status), *stored.shape[1:]), np.nan, stored.dtype)
        table.x[:num] = stored[:num]
    table.messages = {int(i): t for i, t in group.attrs["messages"].items() if int(i) < num}


def _write(array: Any, values: np.ndarray, rows: np.ndarray) -> None:
    size = array.chunks[0]
    for block in np.unique(rows // size):
        these = slice(int(block) * size, min((int(block) + 1) * size, len(values)))
        array[these] = values[these]


def _open(path: Path, mode: str) -> Any:
    try:
        group = zarr().open_group(path, mode=mode)
        found = group.attrs.get("format")
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"store {path} must be a Zarr group of simulations: {error}") from error
    if found != FORMAT:
        raise ValueError(f"store {path} must have the format {FORMAT!r}, got {found!r}")
    return group


def _check_identity(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    different = [name for name in here if there.get(name) != here[name]]
    if different:
        told = "; ".join(f"{n} is {there.get(n)} there and {here[n]} here" for n in different)
        raise ValueError(
            f"store {path} belongs to another run, {' and '.join(different)} differ: {told}; give "
            "another path, or the same arguments"
        )


def _places(theta: PyTree[np.ndarray]) -> dict[str, np.ndarray]:
    sites = theta if isinstance(theta, dict) else {"": theta}
    return {_place(name): leaf for name, leaf in sites.items()}


def _place(site: str) -> str:
    return f"theta/{quote(site, safe='')}" if site else "theta"


def _first(messages: dict[int, str]) -> dict[int, str]:
    return dict(sorted(messages.items())[:NUM_MESSAGES])


__all__ = ["Store", "Table", "describe_theta", "read", "zarr"]
