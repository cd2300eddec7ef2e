"""The loss mask of an indexed dataset, `<prefix>.mask` beside its .bin and .idx: which tokens are trained on.

56 bytes of header, little-endian: magic "MLFRMASK", u64 version 1, u64 number of tokens, SHA-256 of the pair (see
`pair_digest`); then a byte for each token of the .bin: 1 where predicting it counts in the loss, else 0.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lfr._C import TokenFile
from megatron_lfr.fileio import hash_samples

MASK = ".mask"
"""Suffix of the file."""

Mask = npt.NDArray[np.uint8]

_HEADER = struct.Struct("<8sQQ32s")
_MAGIC, _VERSION = b"MLFRMASK", 1

HEADER_BYTES = _HEADER.size


def pair_digest(idx: Path, bin_: Path) -> bytes:
    """Return what ties a mask to its pair: a SHA-256 over the size and up to 64 evenly spaced pages of each file."""
    digest = hashlib.sha256()
    for path in (idx, bin_):
        hash_samples(digest, path)
    return digest.digest()


def make_header(tokens: int, pair: bytes) -> bytes:
    """Return the header of the mask of a pair with this number of tokens and this `pair_digest`."""
    return _HEADER.pack(_MAGIC, _VERSION, tokens, pair)


class LossMask:
    """A mask file, checked when it is opened; it is read on demand.

    tokens, pair: those of the .bin and .idx beside it. ValueError names the file where it is damaged, or of another
    pair, FileNotFoundError where it is missing.
    """

    def __init__(self, path: Path, tokens: int, pair: bytes) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            raise ValueError(f"{path}: too short for the header of a loss mask; truncated?")
        magic, version, count, digest = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise ValueError(f"{path}: not a loss mask (wrong magic)")
        if version != _VERSION:
            raise ValueError(f"{path}: version {version}, only {_VERSION} is known")
        size = path.stat().st_size - HEADER_BYTES
        if size != count:
            what = "truncated" if size < count else "longer than it should be"
            raise ValueError(f"{path}: {what}: holds {size} entries, its header says {count}")
        if (count, digest) != (tokens, pair):
            raise ValueError(
                f"{path}: is the mask of another .bin and .idx (of {count} tokens) than those beside it (of {tokens} "
                "tokens); restore all three files from one place, or preprocess again"
            )
        self._file = TokenFile(str(path), 1, HEADER_BYTES + tokens)

    def read(self, starts: npt.NDArray[np.int64], length: int) -> Mask:
        """Return rows [n, length] of 0 and 1: row r for the tokens from `starts[r]` on."""
        rows = np.empty((len(starts), length), np.uint8)
        self._file.read(starts + HEADER_BYTES, rows)
        if rows.size and rows.max() > 1:
            raise ValueError(f"{self.path}: damaged: holds {rows.max()}, where only 0 and 1 are legal")
        return rows

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the file, all of which is read."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
