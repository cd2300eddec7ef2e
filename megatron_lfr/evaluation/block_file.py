"""A .npy file with a number for each block, written while they are computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.block_values import describing
from megatron_lfr.fileio import fsync_directory, write_atomic

BEGINS = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': ("
"""The beginning of such a file: NumPy's mark, its version, the length of the header, the header."""


class BlockFile:
    """A file fp32 [count], written in block order, that has the name `path` only when it is complete and described.

    describe: makes the description of the numbers. It is in its place before the file is: a process that is killed in
    between leaves no file that nothing describes.

    The file is written with plain writes instead of a memory map: on a full disk they fail with an OSError, while a map
    ends the process.
    """

    def __init__(self, path: Path, count: int, describe: Callable[[npt.NDArray[np.float32]], str]) -> None:
        self.path, self.count, self.describe, self._written = path, count, describe, 0
        self._aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self._file = self._aside.open("wb")
        header = {"descr": "<f4", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: npt.NDArray[np.float32]) -> None:
        self._file.write(np.ascontiguousarray(values, "<f4").tobytes())
        self._written += len(values)

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._written == self.count
                self._file.flush()
                os.fsync(self._file.fileno())
                write_atomic(describing(self.path), self.describe(np.load(self._aside, mmap_mode="r")))
                self._aside.replace(self.path)
                fsync_directory(self.path.parent)
        finally:
            self._file.close()
            self._aside.unlink(missing_ok=True)
