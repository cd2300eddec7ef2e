"""Megatron's indexed dataset (version 1): a `.bin` of token ids and an `.idx` of lengths, pointers and documents."""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_lfr._C import IndexFile, TokenFile
from megatron_lfr.fileio import fsync_directory

DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
"""Element types by the code that stands in the `.idx` (Megatron's numbering)."""

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_CHUNK = 1 << 20
"""Sequences whose pointers are computed at a time."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron's preprocessing stores ids below `vocab_size` in."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class IndexedDatasetWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`, as Megatron does byte for byte.

    A context manager: both files grow aside and take their names when the block ends; an error leaves nothing.
    Memory: eight bytes a sequence. To publish several prefixes together, call `seal` on all of them, then `publish`,
    instead of leaving the block (and `discard` after an error).

    Errors: ValueError for a type that cannot hold token ids, ids that do not fit into it, a sequence of 2³¹ tokens or
    more; OSError naming the file when it cannot be written.
    """

    def __init__(self, prefix: Path | str, dtype: npt.DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = _token_type(np.dtype(dtype), str(prefix))
        self.num_tokens = 0
        self._lengths = array("i")
        self._sequences_of_document = array("i")
        self._sealed = False
        self._bin_aside = _aside(with_suffix(self.prefix, ".bin"))
        self._idx_aside = _aside(with_suffix(self.prefix, ".idx"))
        try:
            self._bin: BinaryIO = self._bin_aside.open("wb", buffering=1 << 20)
        except OSError as error:
            raise _naming(error, with_suffix(self.prefix, ".bin")) from None

    @property
    def num_documents(self) -> int:
        return len(self._sequences_of_document)

    def add_document(self, tokens: npt.ArrayLike | Sequence[npt.NDArray[Any]]) -> None:
        """Append one document: its token ids [n], or a list of arrays, one for each of its sequences."""
        several = isinstance(tokens, (list, tuple)) and bool(tokens) and np.ndim(tokens[0]) == 1
        sequences: Sequence[Any] = tokens if several else [tokens]  # type: ignore[assignment]
        arrays = [self._checked(np.asarray(sequence)) for sequence in sequences]
        for sequence in arrays:
            self._append(sequence)
        self._lengths.extend(len(sequence) for sequence in arrays)
        self._sequences_of_document.append(len(arrays))

    def add_documents(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None:
        """Append many documents of one sequence each: all their ids in one array, and each one's length."""
        if lengths.size and lengths.min() < 0:
            raise ValueError(f"{self.prefix}: a document's length is negative")
        if int(lengths.sum(dtype=np.int64)) != len(tokens):
            raise ValueError(f"{self.prefix}: lengths add up to {lengths.sum()}, not to the {len(tokens)} tokens")
        self._append(self._checked(tokens))
        self._lengths.frombytes(np.ascontiguousarray(lengths, np.intc).tobytes())
        self._sequences_of_document.frombytes(np.ones(len(lengths), np.intc).tobytes())

    def seal(self) -> None:
        """Write the `.idx` aside and bring both files to the disk. Nothing can be added afterwards."""
        try:
            _finish(self._bin)
            with self._idx_aside.open("wb", buffering=1 << 20) as file:
                self._write_index(file)
                _finish(file)
        except OSError as error:
            raise _naming(error, self.prefix) from None
        self._sealed = True

    def publish(self) -> None:
        """Give both files their names. Between the renames no `.idx` exists: no reader meets a mixed pair."""
        if not self._sealed:
            raise RuntimeError("publish() before seal()")
        index = with_suffix(self.prefix, ".idx")
        index.unlink(missing_ok=True)
        self._bin_aside.replace(with_suffix(self.prefix, ".bin"))
        self._idx_aside.replace(index)
        fsync_directory(index.parent)

    def discard(self) -> None:
        """Remove what was written aside. Harmless when there is nothing."""
        with contextlib.suppress(OSError):  # the last buffer may not fit onto the disk either
            self._bin.close()
        self._bin_aside.unlink(missing_ok=True)
        self._idx_aside.unlink(missing_ok=True)

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
            raise ValueError(f"{self.prefix}: {tokens.size} tokens in one piece; the format's limit is 2147483647")
        return np.ascontiguousarray(tokens, self.dtype.newbyteorder("<"))

    def _append(self, tokens: npt.NDArray[Any]) -> None:
        try:
            self._bin.write(tokens.data)
        except OSError as error:
            raise _naming(error, with_suffix(self.prefix, ".bin")) from None
        self.num_tokens += tokens.size

    def _write_index(self, file: BinaryIO) -> None:
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        lengths = np.frombuffer(self._lengths, np.intc) if self._lengths else np.zeros(0, np.intc)
        documents = np.frombuffer(self._sequences_of_document, np.intc) if self.num_documents else lengths[:0]
        file.write(_MAGIC + struct.pack("<QBQQ", _VERSION, code, len(lengths), len(documents) + 1))
        for first in range(0, len(lengths), _CHUNK):
            file.write(lengths[first : first + _CHUNK].astype("<i4").data)
        _write_running_sum(file, lengths, self.dtype.itemsize)
        _write_running_sum(file, documents, 1)
        file.write(struct.pack("<q", len(lengths)))


class IndexedDataset:
    """A pair of `.bin` and `.idx`, checked when it is opened; documents are read on demand.

    Errors: FileNotFoundError when one of the files is missing, ValueError when the pair is damaged or does not hold
    token ids.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        if self.prefix.suffix in (".bin", ".idx"):
            raise ValueError(f"{prefix}: give the prefix, {self.prefix.with_suffix('')}, not one of its files")
        for suffix in (".idx", ".bin"):
            if not with_suffix(self.prefix, suffix).exists():
                raise FileNotFoundError(f"{with_suffix(self.prefix, suffix)}: no such file")
        self.index = IndexFile(str(with_suffix(self.prefix, ".idx")))
        self.dtype = DTYPES[self.index.dtype_code]
        self.num_documents: int = self.index.num_documents
        self.num_tokens: int = self.index.num_tokens
        self._tokens = TokenFile(str(with_suffix(self.prefix, ".bin")), self.index.item_size, self.num_tokens)

    def document_offset(self, document: int) -> int:
        """The position of a document's first token; of `num_documents`: the number of tokens."""
        return int(self.index.token_offset(document))

    def document(self, document: int) -> npt.NDArray[Any]:
        """The token ids of a document [its length], in the type that they are stored in."""
        first, last = self.document_offset(document), self.document_offset(document + 1)
        if last < first:
            raise ValueError(f"{with_suffix(self.prefix, '.idx')}: changed while it was in use")
        tokens: npt.NDArray[Any] = self.read(np.array([first], np.int64), last - first)[0]
        return tokens

    def read(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """Rows [n, length] of tokens, in the type that they are stored in: row r from position `starts[r]` on."""
        rows = np.empty((len(starts), length), self.dtype)
        self._tokens.read(starts, rows)
        return rows


def with_suffix(prefix: Path, suffix: str) -> Path:
    """`<prefix><suffix>`, for prefixes that may hold dots."""
    return prefix.with_name(prefix.name + suffix)


def _token_type(dtype: np.dtype[Any], name: str) -> np.dtype[Any]:
    legal = [known for known in DTYPES.values() if known.kind in "iu"]
    if dtype not in legal:
        raise ValueError(f"{name}: {dtype.name} cannot hold token ids; choose from {', '.join(t.name for t in legal)}")
    return dtype


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _naming(error: OSError, path: Path) -> OSError:
    """The same error with the file's name, which write() does not know."""
    return OSError(error.errno, error.strerror, str(path))


def _finish(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _write_running_sum(file: BinaryIO, counts: npt.NDArray[np.intc], scale: int) -> None:
    """Write, for each count, `scale` times the sum of those before it, as i64."""
    total = 0
    for first in range(0, len(counts), _CHUNK):
        ends = np.cumsum(counts[first : first + _CHUNK], dtype=np.int64)
        file.write(((total + np.concatenate(([0], ends[:-1]))) * scale).astype("<i8").data)
        total += int(ends[-1])
