"""Megatron's indexed dataset (version 1): a `.bin` of token ids and an `.idx` of lengths, pointers and documents.
Beside them, there may be a mask of the loss (mask.py)."""

from __future__ import annotations

import errno
import os
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr._C import IndexFile, TokenFile
from megatron_lfr.data.corpus.mask import MASK, LossMask, Mask, pair_digest
from megatron_lfr.output import is_utf8

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
"""Element types by their code in the `.idx` (Megatron's numbering)."""

META = ".meta"
"""Suffix of the file beside a pair that says what made it (sidecar.py)."""


_HEADER_BYTES = 34
"""Size of the header of an `.idx`: magic, version, type code and two counts."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type in which Megatron's preprocessing stores ids below `vocab_size`."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class IndexedDataset:
    """A pair of `.bin` and `.idx`, checked when it is opened; documents are read on demand. mask: that of the loss;
    None where all tokens count.

    Errors: FileNotFoundError when one of the files is missing, ValueError when the pair is damaged or does not hold
    token ids, and when the mask is damaged or of another pair.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        if not is_utf8(str(prefix)):
            raise ValueError(f"{prefix}: is not UTF-8; rename its files")
        if self.prefix.suffix in (".bin", ".idx"):
            raise ValueError(f"{prefix}: give the prefix, {self.prefix.with_suffix('')}, not one of its files")
        for suffix in (".idx", ".bin"):
            if not with_suffix(self.prefix, suffix).exists():
                raise FileNotFoundError(f"{with_suffix(self.prefix, suffix)}: no such file")
        self.index = IndexFile(str(with_suffix(self.prefix, ".idx")))
        self.dtype = DTYPES[self.index.dtype_code]
        self.num_documents: int = self.index.num_documents
        self.num_tokens: int = self.index.num_tokens
        self.token_file = TokenFile(str(with_suffix(self.prefix, ".bin")), self.index.item_size, self.num_tokens)
        self.mask = _open_mask(self.prefix, self.num_tokens)

    def document_offset(self, document: int) -> int:
        """Return the position of a document's first token; for `num_documents`, the number of tokens."""
        return int(self.index.token_offset(document))

    def sequences_of_documents(self, documents: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield how many sequences each document has, for `documents` documents at a time."""
        path = with_suffix(self.prefix, ".idx")
        entries_at = _HEADER_BYTES + 12 * self.index.num_sequences  # after all lengths and pointers
        for first in range(0, self.num_documents, documents):
            entries = min(documents, self.num_documents - first) + 1
            bounds = np.fromfile(path, "<i8", entries, offset=entries_at + 8 * first)
            if len(bounds) < entries:
                raise OSError(errno.EIO, "The file ends early: it was cut off while in use", str(path))
            yield np.diff(bounds)

    def document(self, document: int) -> npt.NDArray[Any]:
        """Return the token ids of a document [length], in the type in which they are stored."""
        first, last = self.document_offset(document), self.document_offset(document + 1)
        if last < first:
            raise ValueError(f"{with_suffix(self.prefix, '.idx')}: changed while it was in use")
        tokens: npt.NDArray[Any] = self.read(np.array([first], np.int64), last - first)[0]
        return tokens

    def mask_of(self, document: int) -> Mask | None:
        """Return the mask of a document [length]; None where all tokens count."""
        if self.mask is None:
            return None
        first, last = self.document_offset(document), self.document_offset(document + 1)
        mask: Mask = self.mask.read(np.array([first], np.int64), max(0, last - first))[0]
        return mask

    def read(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """Return rows of tokens [n, length], in the type in which they are stored: row r from `starts[r]` on."""
        rows = np.empty((len(starts), length), self.dtype)
        self.token_file.read(starts, rows)
        return rows


def _open_mask(prefix: Path, tokens: int) -> LossMask | None:
    path = with_suffix(prefix, MASK)
    if not os.path.lexists(path):
        return None
    return LossMask(path, tokens, pair_digest(with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")))


def files_of(prefix: Path | str) -> Hashable:
    """Return what is equal for two prefixes of the same tokens: the file that holds them, whatever links lead to it."""
    path = with_suffix(Path(prefix), ".bin")
    try:
        status = path.stat()
    except OSError:  # it is not there, or not to be read, which whoever opens it says
        return path.resolve()
    return status.st_dev, status.st_ino


def first_shared(prefixes: Iterable[str], others: Iterable[str]) -> str | None:
    """Return the first of some prefixes whose files are those of one of the others, too; None where none is."""
    files = {files_of(prefix) for prefix in others}
    return next((prefix for prefix in prefixes if files_of(prefix) in files), None)


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Return `<prefix><suffix>`, for prefixes that may contain dots."""
    return prefix.with_name(prefix.name + suffix)
