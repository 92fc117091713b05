"""What arrived since a store was last written, record after record in one file.

Writing chunks of a Zarr array is slow, appending is not: so every draw is on disk as soon as it has
arrived, and until it is in the arrays. A kill may cut the last record short, and it alone is lost;
its length and its checksum tell.
"""

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HEAD = struct.Struct("<QI")  # bytes of a record, and their CRC-32


class Arrived(NamedTuple):
    """What became of some draws; `x` is `None` while no shape is known, and rows may be blank."""

    draws: np.ndarray  # [k], their numbers
    status: np.ndarray  # [k]
    x: np.ndarray | None  # [k, *x]
    messages: dict[int, str]  # by draw


class Journal:
    """The file at `path`, which need not be there."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, arrived: Arrived) -> None:
        """Append one record."""
        arrays: dict[str, Any] = {"draws": arrived.draws, "status": arrived.status}
        if arrived.x is not None:
            arrays["x"] = arrived.x
        messages = json.dumps([(int(i), text) for i, text in arrived.messages.items()])
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, messages=np.array(messages))
        record = buffer.getvalue()
        with self.path.open("ab") as file:
            file.write(HEAD.pack(len(record), zlib.crc32(record)) + record)

    def __iter__(self) -> Iterator[Arrived]:
        """Every whole record, in order."""
        try:
            data = io.BytesIO(self.path.read_bytes())
        except FileNotFoundError:
            return
        while len(head := data.read(HEAD.size)) == HEAD.size:
            size, checksum = HEAD.unpack(head)
            record = data.read(size)
            if not 0 < size == len(record) or zlib.crc32(record) != checksum:
                return
            arrays = dict(np.load(io.BytesIO(record)))
            messages = dict(json.loads(str(arrays.pop("messages"))))
            yield Arrived(**{"x": None, **arrays}, messages=messages)

    def clear(self) -> None:
        """Drop all records, once they are in the store."""
        self.path.unlink(missing_ok=True)


__all__ = ["Arrived", "Journal"]
