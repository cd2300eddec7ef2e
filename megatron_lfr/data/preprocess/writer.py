"""Writes Megatron's indexed dataset: the `.bin` and `.idx` that corpus/indexed.py reads, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.indexed import DTYPES, META, IndexedDataset, with_suffix
from megatron_lfr.data.corpus.mask import MASK
from megatron_lfr.data.preprocess.mask_writer import MaskWriter
from megatron_lfr.data.preprocess.spool import Spool
from megatron_lfr.fileio import append_file, fsync_directory

SUFFIXES = (".bin", MASK, META, ".idx")
"""Those of all files of a prefix, in the order in which they get their names."""

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_CHUNK = 1 << 20
"""How many sequences' pointers are computed at a time."""


@dataclass(frozen=True)
class Extent:
    """How much of a writer's files is durably on disk, from where another writer can continue."""

    tokens: int
    sequences: int
    documents: int


class IndexedDatasetWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`, byte for byte as Megatron does, in bounded memory.

    It is a context manager: both files grow under temporary names and get their final ones when the block ends; after
    an error nothing is left. To publish several prefixes together, do not leave the block, but call `seal` on all of
    them, then `publish` (and `discard` after an error). With a folder `work` on the prefix's file system, the files
    grow there under fixed names: after a kill, a writer with the same folder continues from `start`, which is what
    `durable` last returned. meta: the content of `<prefix>.meta`; None for no such file. masked: whether it writes a
    loss mask, `<prefix>.mask`; all tokens that are added without one count.

    Errors: ValueError for a type that cannot hold token ids, ids that do not fit into it, a sequence of 2³¹ tokens or
    more, and a `work` that holds less than `start`; OSError naming the file when it cannot be written.
    """

    def __init__(
        self,
        prefix: Path | str,
        dtype: npt.DTypeLike,
        work: Path | None = None,
        start: Extent | None = None,
        *,
        masked: bool = False,
    ) -> None:
        self.prefix = Path(prefix)
        self.meta: str | None = None
        self.dtype = _token_type(np.dtype(dtype), str(prefix))
        start = start or Extent(0, 0, 0)
        self.num_tokens = start.tokens
        self._durable: Extent | None = None
        self._sealed = False
        lengths, documents = (_aside(with_suffix(self.prefix, suffix), work) for suffix in (".lengths", ".documents"))
        self._aside = {suffix: _aside(with_suffix(self.prefix, suffix), work) for suffix in SUFFIXES}
        bin_aside = self._aside[".bin"]
        with self._naming_errors():
            self._bin: BinaryIO = bin_aside.open("r+b" if start.tokens else "wb", buffering=1 << 20)
            if self._bin.seek(0, os.SEEK_END) < start.tokens * self.dtype.itemsize:
                raise ValueError(f"{bin_aside}: shorter than the {start.tokens} tokens that it should hold")
            self._bin.seek(start.tokens * self.dtype.itemsize)
            self._bin.truncate()
            self._lengths = Spool(lengths, start.sequences)
            self._sequences_of_document = Spool(documents, start.documents)
            self._mask = MaskWriter(self._aside[MASK], start.tokens) if masked else None

    @property
    def num_documents(self) -> int:
        return len(self._sequences_of_document)

    def add_document(
        self, tokens: npt.ArrayLike | Sequence[npt.NDArray[Any]], mask: npt.NDArray[Any] | None = None
    ) -> None:
        """Append a document: its token ids [n], or a list of arrays, one for each of its sequences; and the mask."""
        several = isinstance(tokens, (list, tuple)) and bool(tokens) and np.ndim(tokens[0]) == 1
        sequences: Sequence[Any] = tokens if several else [tokens]  # type: ignore[assignment]
        arrays = [self._checked(np.asarray(sequence)) for sequence in sequences]
        self._append_mask(mask, sum(map(len, arrays)))
        for sequence in arrays:
            self._append(sequence)
        with self._naming_errors():
            for sequence in arrays:
                self._lengths.append(len(sequence))
            self._sequences_of_document.append(len(arrays))

    def add_documents(
        self, tokens: npt.NDArray[Any], lengths: npt.NDArray[Any], mask: npt.NDArray[Any] | None = None
    ) -> None:
        """Append many documents of one sequence each: all their ids in one array, the length of each, and the mask of
        all."""
        if lengths.size and lengths.min() < 0:
            raise ValueError(f"{self.prefix}: a document's length is negative")
        if int(lengths.sum(dtype=np.int64)) != len(tokens):
            raise ValueError(f"{self.prefix}: lengths add up to {lengths.sum()}, not to the {len(tokens)} tokens")
        checked = self._checked(tokens)
        self._append_mask(mask, len(checked))
        self._append(checked)
        with self._naming_errors():
            self._lengths.extend(lengths)
            self._sequences_of_document.extend(np.ones(len(lengths), np.intc))

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of a dataset of the same type; the kernel copies its `.bin`."""
        if dataset.dtype != self.dtype:
            raise ValueError(f"{dataset.prefix}: holds {dataset.dtype.name}, but {self.prefix} {self.dtype.name}")
        if dataset.mask is not None and self._mask is None:
            raise ValueError(f"{dataset.prefix}: has a loss mask, but {self.prefix} is written without one")
        with self._naming_errors():
            if self._mask is not None:
                self._mask.append_mask(dataset.mask, dataset.num_tokens)
            append_file(with_suffix(dataset.prefix, ".bin"), self._bin)
            for first in range(0, dataset.index.num_sequences, _CHUNK):
                last = min(first + _CHUNK, dataset.index.num_sequences)
                self._lengths.extend(dataset.index.sequence_lengths(first, last))
            for counts in dataset.sequences_of_documents(_CHUNK):
                self._sequences_of_document.extend(counts)
        self.num_tokens += dataset.num_tokens

    def durable(self) -> Extent:
        """Bring what was added to the disk, so that it survives a kill and a power cut; return how much that is."""
        extent = Extent(self.num_tokens, len(self._lengths), self.num_documents)
        if extent != self._durable:
            with self._naming_errors():
                self._bin.flush()
                os.fsync(self._bin.fileno())
                if self._mask is not None:
                    self._mask.durable()
                self._lengths.flush(durable=True)
                self._sequences_of_document.flush(durable=True)
            self._durable = extent
        return extent

    def seal(self) -> None:
        """Write the `.idx` under a temporary name and bring all files to the disk. Nothing can be added afterwards."""
        with self._naming_errors():
            _finish(self._bin)
            with self._aside[".idx"].open("wb", buffering=1 << 20) as file:
                self._write_index(file)
                _finish(file)
            if self._mask is not None:
                self._mask.seal(self._aside[".idx"], self._aside[".bin"])
            if self.meta is not None:
                with self._aside[META].open("wb") as file:
                    file.write(self.meta.encode())
                    _finish(file)
        self._sealed = True

    def publish(self) -> None:
        """Give all files their final names. Between the renames there is no `.idx`, so no reader sees a mixed pair."""
        if not self._sealed:
            raise RuntimeError("publish() before seal()")
        publish_pair(self.prefix, self._aside)

    def close(self) -> None:
        """Close the temporary files and leave them as they are. Harmless after `seal`."""
        with contextlib.suppress(OSError):  # the last buffer may not fit onto the disk either
            self._bin.close()
        if self._mask is not None:
            with contextlib.suppress(OSError):
                self._mask.close()

    def discard(self) -> None:
        """Delete the temporary files, if there are any."""
        self.close()
        for aside in self._aside.values():
            aside.unlink(missing_ok=True)
        self._lengths.discard()
        self._sequences_of_document.discard()

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.seal()
                self.publish()
        finally:
            self.discard()

    def _checked(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if tokens.ndim != 1:
            raise ValueError(
                f"{self.prefix}: token ids must form a one-dimensional array, not {tokens.ndim}-dimensional"
            )
        if tokens.size and not np.can_cast(tokens.dtype, self.dtype, "safe"):
            limits = np.iinfo(self.dtype)
            if tokens.dtype.kind not in "iu":
                raise ValueError(f"{self.prefix}: token ids must be integers, not {tokens.dtype}")
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise ValueError(
                    f"{self.prefix}: token ids {tokens.min()}..{tokens.max()} do not fit into {self.dtype.name} "
                    f"({limits.min}..{limits.max})"
                )
        if tokens.size > np.iinfo(np.intc).max:
            raise ValueError(f"{self.prefix}: {tokens.size} tokens in one sequence; the format's limit is 2147483647")
        return np.ascontiguousarray(tokens, self.dtype.newbyteorder("<"))

    def _append(self, tokens: npt.NDArray[Any]) -> None:
        with self._naming_errors():
            self._bin.write(tokens.data)
        self.num_tokens += tokens.size

    def _append_mask(self, mask: npt.NDArray[Any] | None, tokens: int) -> None:
        """Append the mask of so many tokens, before these: an error must leave no token without its entry."""
        if self._mask is None:
            if mask is not None:
                raise ValueError(f"{self.prefix}: is written without a loss mask")
            return
        mask = np.ones(tokens, np.uint8) if mask is None else mask
        if mask.shape != (tokens,):
            raise ValueError(f"{self.prefix}: a mask of shape {list(mask.shape)} for {tokens} tokens")
        with self._naming_errors():
            self._mask.append(mask)

    def _write_index(self, file: BinaryIO) -> None:
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        file.write(_MAGIC + struct.pack("<QBQQ", _VERSION, code, len(self._lengths), self.num_documents + 1))
        for lengths in self._lengths.chunks(_CHUNK):
            file.write(lengths.astype("<i4").data)
        for starts in self._lengths.running_sums(_CHUNK):
            file.write((starts * self.dtype.itemsize).astype("<i8").data)
        for firsts in self._sequences_of_document.running_sums(_CHUNK):
            file.write(firsts.astype("<i8").data)
        file.write(struct.pack("<q", len(self._lengths)))

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Add the name of the file, which write() does not know, to errors."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(with_suffix(self.prefix, ".bin"))) from None


def _token_type(dtype: np.dtype[Any], name: str) -> np.dtype[Any]:
    legal = [known for known in DTYPES.values() if known.kind in "iu"]
    if dtype not in legal:
        raise ValueError(f"{name}: {dtype.name} cannot hold token ids; choose from {', '.join(t.name for t in legal)}")
    return dtype


def publish_pair(prefix: Path, aside: Mapping[str, Path]) -> None:
    """Give a pair, and its sidecar and loss mask if there are any, their final names; skip those that already have
    them. aside: the present names, by SUFFIXES.

    Between the renames there is no `.idx`, so no reader sees a mixed pair. The same call finishes a publication that
    was interrupted."""
    if aside[".bin"].exists():
        for suffix in (".idx", META, MASK):
            with_suffix(prefix, suffix).unlink(missing_ok=True)
    for suffix in SUFFIXES:
        if aside[suffix].exists():
            aside[suffix].replace(with_suffix(prefix, suffix))
    fsync_directory(prefix.parent)


def _aside(path: Path, work: Path | None) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}") if work is None else work / path.name


def _finish(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
