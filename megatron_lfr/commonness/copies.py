"""Finds exact and near copies among documents, and among blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.commonness.items import Spans

Counts = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Copies:
    """How often the content of each item [n] occurs; items are numbered over all prefixes.

    copies: how many items have exactly its tokens, itself among them. near_copies: how many are in its cluster of near
    copies, exact ones and itself among them. representative: the cluster's lowest id.
    """

    copies: Counts
    near_copies: Counts
    representative: Counts

    @property
    def firsts(self) -> npt.NDArray[np.bool_]:
        """Return which items are no near copies of one before [n]."""
        firsts: npt.NDArray[np.bool_] = self.representative == np.arange(len(self.representative))
        return firsts


def find_copies(spans: Sequence[Spans], shingle: int, threshold: float, threads: int, signatures: Path) -> Copies:
    """Find what was copied. spans: the items of each prefix; those of no tokens count as copies of each other.

    Exact copies are those with equal 64-bit hashes of their tokens. Near copies are the connected components of pairs
    whose sets of runs of `shingle` tokens have a Jaccard similarity of `threshold` or more, as min-hash signatures of
    128 bins estimate it; pairs are looked for by locality-sensitive hashing, 32 bands of 4 bins, which misses one of
    similarity s with a chance of about (1 - s^4)^32.
    signatures: a file for them, 256 bytes an item, which is removed.
    """
    total = sum(len(part.starts) for part in spans)
    hashes = np.empty(total, np.uint64)
    first = 0
    try:
        with signatures.open("wb") as file:
            for part in spans:
                for batch in part.batches():
                    size = len(batch.starts)
                    sketches = np.empty((size, _C.SIGNATURE_BINS), np.uint16)
                    target = hashes[first : first + size]
                    _C.sketch_spans(*batch.arguments(), shingle, target, sketches, threads)
                    file.write(sketches.tobytes())
                    first += size
        exact, copies = _C.exact_copies(hashes, threads)
        del hashes
        representative = _C.near_copies(str(signatures), exact, threshold, threads)
    finally:
        signatures.unlink(missing_ok=True)
    sizes = np.bincount(representative, minlength=total).astype(np.uint32)
    return Copies(copies, sizes[representative], representative)
