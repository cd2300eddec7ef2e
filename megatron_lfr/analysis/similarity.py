"""Sets of blocks as bits, and how alike two of them are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class BlockSet:
    """A set of blocks of one corpus, and the blocks that it was chosen from: a bit of each for every one of its
    `n_blocks` blocks. Between two `starts` it was chosen apart from the rest."""

    bits: npt.NDArray[np.uint8]
    candidates: npt.NDArray[np.uint8]
    n_blocks: int
    starts: tuple[int, ...]

    @staticmethod
    def of(
        mask: npt.NDArray[np.bool_], candidates: npt.NDArray[np.bool_], starts: tuple[int, ...] | None = None
    ) -> BlockSet:
        """The blocks that `mask` [n_blocks] marks, all of which are among the `candidates` [n_blocks]."""
        return BlockSet(np.packbits(mask), np.packbits(candidates), len(mask), starts or (0, len(mask)))

    @property
    def size(self) -> int:
        return int(_ONES[self.bits].sum(dtype=np.int64))

    def shares(self, edges: list[int]) -> npt.NDArray[np.float64]:
        """Which share of the candidates the set has, in the part of the corpus that each of the `edges` lies in."""
        chosen, of = (_counts(bits, self.n_blocks, self.starts) for bits in (self.bits, self.candidates))
        return (chosen / np.maximum(1, of))[np.searchsorted(self.starts, edges, side="right") - 1]


@dataclass(frozen=True)
class Likeness:
    """Two sets A and B against each other; NaN where one of them is empty."""

    overlap: float
    """|A∩B| / |A∪B| (Jaccard)."""
    cosine: float
    """|A∩B| / sqrt(|A||B|): the cosine of their indicator vectors, the paper's measure."""
    by_chance: float
    """The cosine to expect of random sets of these sizes, each from its own candidates C, in each part that it was
    chosen in: of a single one sqrt(|A||B|) |C_A∩C_B| / (|C_A||C_B|)."""


def compare(a: BlockSet, b: BlockSet) -> Likeness:
    """How alike two sets are. ValueError where they are of corpora of different sizes."""
    if a.n_blocks != b.n_blocks:
        raise ValueError(f"sets of {a.n_blocks} and of {b.n_blocks} blocks cannot be compared")
    size_a, size_b = a.size, b.size
    if not size_a or not size_b:
        return Likeness(math.nan, math.nan, math.nan)
    both = int(_ONES[a.bits & b.bits].sum(dtype=np.int64))
    norm = math.sqrt(size_a * size_b)
    edges = sorted({*a.starts, *b.starts})
    common = _counts(a.candidates & b.candidates, a.n_blocks, edges)
    expected = float((common * a.shares(edges[:-1]) * b.shares(edges[:-1])).sum())
    return Likeness(both / (size_a + size_b - both), both / norm, expected / norm)


def _counts(bits: npt.NDArray[np.uint8], n_blocks: int, starts: Sequence[int]) -> npt.NDArray[np.int64]:
    """How many blocks are marked between each two `starts`."""
    return np.add.reduceat(np.unpackbits(bits, count=n_blocks), starts[:-1], dtype=np.int64)
