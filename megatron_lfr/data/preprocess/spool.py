"""A growing list of 32-bit integers in a file, so that memory does not grow with it."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_IN_MEMORY = 1 << 16
"""How many entries are buffered before they are written."""


class Spool:
    """Appends integers to `path`, which is open only while it is written, so that many spools need no open files.

    keep: how many entries that an earlier spool has left in the file are kept; what follows them is cut off.
    Errors: ValueError when the file holds fewer than `keep`; OSError when it cannot be written.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._path = path
        self._written = keep
        self._waiting = array("i")
        with path.open("r+b" if keep else "wb") as file:
            if file.seek(0, os.SEEK_END) < 4 * keep:
                raise ValueError(f"{path}: shorter than the {keep} entries that it should hold")
            file.truncate(4 * keep)

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def append(self, value: int) -> None:
        self._waiting.append(value)
        if len(self._waiting) >= _IN_MEMORY:
            self.flush()

    def extend(self, values: npt.NDArray[Any]) -> None:
        self._waiting.frombytes(np.ascontiguousarray(values, np.intc).tobytes())
        if len(self._waiting) >= _IN_MEMORY:
            self.flush()

    def flush(self, durable: bool = False) -> None:
        """Write the buffered entries; `durable` also brings the file to the disk (fsync)."""
        if not self._waiting and not durable:
            return
        with self._path.open("ab") as file:
            file.write(self._waiting)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        self._written += len(self._waiting)
        self._waiting = array("i")

    def chunks(self, entries: int) -> Iterator[npt.NDArray[np.intc]]:
        """Yield all entries in order, `entries` at a time."""
        self.flush()
        with self._path.open("rb") as file:
            while data := file.read(4 * entries):
                yield np.frombuffer(data, np.intc)

    def running_sums(self, entries: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield for every entry the sum of those before it, `entries` at a time."""
        total = 0
        for chunk in self.chunks(entries):
            ends = np.cumsum(chunk, dtype=np.int64) + total
            yield np.concatenate(([total], ends[:-1]))
            total = int(ends[-1])

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)
