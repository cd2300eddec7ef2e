"""Writes the loss mask of an indexed dataset (corpus/mask.py) beside the .bin that grows with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.mask import HEADER_BYTES, LossMask, make_header, pair_digest

_CHUNK = 1 << 22
"""How many tokens of another mask are copied at a time."""


class MaskWriter:
    """Appends to the mask `path`, from entry `start` on. ValueError where the file holds less than that."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self._file: BinaryIO = path.open("r+b" if start else "wb", buffering=1 << 20)
        if not start:
            self._file.write(bytes(HEADER_BYTES))
        if self._file.seek(0, os.SEEK_END) < HEADER_BYTES + start:
            raise ValueError(f"{path}: shorter than the {start} entries that it should hold")
        self._file.seek(HEADER_BYTES + start)
        self._file.truncate()

    def append(self, mask: npt.NDArray[Any]) -> None:
        """Append entries [n], which are 0 or 1, or bool."""
        self._file.write(np.ascontiguousarray(mask, np.uint8).data)

    def append_mask(self, mask: LossMask | None, tokens: int) -> None:
        """Append the mask of a dataset of so many tokens, all of which count where it has none."""
        for first in range(0, tokens, _CHUNK):
            count = min(_CHUNK, tokens - first)
            starts = np.array([first], np.int64)
            self.append(np.ones(count, np.uint8) if mask is None else mask.read(starts, count)[0])

    def durable(self) -> None:
        """Bring what was appended to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def seal(self, idx: Path, bin_: Path) -> None:
        """Write the header, for a pair whose files are complete, and bring all of it to the disk."""
        tokens = self._file.seek(0, os.SEEK_END) - HEADER_BYTES
        self._file.seek(0)
        self._file.write(make_header(tokens, pair_digest(idx, bin_)))
        self.durable()
        self._file.close()

    def close(self) -> None:
        self._file.close()
