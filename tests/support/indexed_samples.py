"""Indexed datasets written by hand, from the format's description, for the readers under test."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.int64): 5, np.dtype(np.uint16): 8}

WriteCorpus = Callable[..., Path]


def write_by_hand(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> Path:
    """One sequence a document, laid out with struct and numpy only."""
    item = np.dtype(dtype).itemsize
    lengths = [len(document) for document in documents]
    starts = [sum(lengths[:i]) * item for i in range(len(lengths))]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[np.dtype(dtype)], len(lengths), len(lengths) + 1)
    body = np.array(lengths, "<i4").tobytes() + np.array(starts, "<i8").tobytes()
    documents_at = np.arange(len(lengths) + 1).astype("<i8").tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(header + body + documents_at)
    flat = [token for document in documents for token in document]
    prefix.with_name(prefix.name + ".bin").write_bytes(np.array(flat, dtype).tobytes())
    return prefix


def write_mask_by_hand(prefix: Path, mask: Sequence[int]) -> Path:
    """Write the loss mask of a pair of less than 4 KiB a file, laid out as docs/data_plane.md says."""
    digest = hashlib.sha256()
    for suffix in (".idx", ".bin"):
        content = prefix.with_name(prefix.name + suffix).read_bytes()
        assert len(content) <= 4096
        digest.update(f"{len(content)}\n".encode() + content)
    header = b"MLFRMASK" + struct.pack("<QQ", 1, len(mask)) + digest.digest()
    path = prefix.with_name(prefix.name + ".mask")
    path.write_bytes(header + bytes(mask))
    return path
