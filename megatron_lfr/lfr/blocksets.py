"""Sets of blocks as bits, and how alike two of them are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class BlockSet:
    """A set of blocks of one corpus: a bit for each of its `n_blocks` blocks."""

    bits: npt.NDArray[np.uint8]
    size: int
    n_blocks: int

    @staticmethod
    def of(mask: npt.NDArray[np.bool_]) -> BlockSet:
        """The blocks that `mask` [n_blocks] marks."""
        return BlockSet(np.packbits(mask), int(mask.sum()), len(mask))


@dataclass(frozen=True)
class Likeness:
    """Two sets A and B against each other; NaN where one of them is empty."""

    overlap: float
    """|A∩B| / |A∪B| (Jaccard)."""
    cosine: float
    """|A∩B| / sqrt(|A||B|): the cosine of their indicator vectors, the paper's measure."""
    by_chance: float
    """The cosine to expect of two random sets of these sizes: sqrt(|A||B|) / n_blocks."""


def compare(a: BlockSet, b: BlockSet) -> Likeness:
    """How alike two sets are. ValueError where they are of corpora of different sizes."""
    if a.n_blocks != b.n_blocks:
        raise ValueError(f"sets of {a.n_blocks} and of {b.n_blocks} blocks cannot be compared")
    if not a.size or not b.size:
        return Likeness(math.nan, math.nan, math.nan)
    both = int(_ONES[a.bits & b.bits].sum(dtype=np.int64))
    norm = math.sqrt(a.size * b.size)
    return Likeness(both / (a.size + b.size - both), both / norm, norm / a.n_blocks)
