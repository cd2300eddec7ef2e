"""Sets of blocks as bits, and how alike two of them are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class BlockSet:
    """A set of blocks of one corpus, and the blocks that it was chosen from: a bit of each for every one of its
    `n_blocks` blocks."""

    bits: npt.NDArray[np.uint8]
    candidates: npt.NDArray[np.uint8]
    n_blocks: int

    @staticmethod
    def of(mask: npt.NDArray[np.bool_], candidates: npt.NDArray[np.bool_]) -> BlockSet:
        """The blocks that `mask` [n_blocks] marks, all of which are among the `candidates` [n_blocks]."""
        return BlockSet(np.packbits(mask), np.packbits(candidates), len(mask))

    @property
    def size(self) -> int:
        return _count(self.bits)


@dataclass(frozen=True)
class Likeness:
    """Two sets A and B against each other; NaN where one of them is empty."""

    overlap: float
    """|A∩B| / |A∪B| (Jaccard)."""
    cosine: float
    """|A∩B| / sqrt(|A||B|): the cosine of their indicator vectors, the paper's measure."""
    by_chance: float
    """The cosine to expect of random sets of these sizes, each from its own candidates C: sqrt(|A||B|) |C_A∩C_B| /
    (|C_A||C_B|)."""


def compare(a: BlockSet, b: BlockSet) -> Likeness:
    """How alike two sets are. ValueError where they are of corpora of different sizes."""
    if a.n_blocks != b.n_blocks:
        raise ValueError(f"sets of {a.n_blocks} and of {b.n_blocks} blocks cannot be compared")
    size_a, size_b = a.size, b.size
    if not size_a or not size_b:
        return Likeness(math.nan, math.nan, math.nan)
    both = _count(a.bits & b.bits)
    norm = math.sqrt(size_a * size_b)
    common = _count(a.candidates & b.candidates) / (_count(a.candidates) * _count(b.candidates))
    return Likeness(both / (size_a + size_b - both), both / norm, norm * common)


def _count(bits: npt.NDArray[np.uint8]) -> int:
    return int(_ONES[bits].sum(dtype=np.int64))
