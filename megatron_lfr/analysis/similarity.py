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
    """A set of blocks of one corpus, and the candidates that it was chosen from, each as one bit for each of the
    corpus's `n_blocks` blocks. The stretches of the corpus that begin at `starts` were each chosen from separately."""

    bits: npt.NDArray[np.uint8]
    candidates: npt.NDArray[np.uint8]
    n_blocks: int
    starts: tuple[int, ...]

    @staticmethod
    def of(
        mask: npt.NDArray[np.bool_], candidates: npt.NDArray[np.bool_], starts: tuple[int, ...] | None = None
    ) -> BlockSet:
        """Make a set of the blocks that `mask` [n_blocks] marks, which must be among the `candidates` [n_blocks]."""
        return BlockSet(np.packbits(mask), np.packbits(candidates), len(mask), starts or (0, len(mask)))

    @property
    def size(self) -> int:
        return int(_ONES[self.bits].sum(dtype=np.int64))

    def shares(self, edges: list[int]) -> npt.NDArray[np.float64]:
        """Return the share of the candidates that are in the set, in the stretch around each block of `edges`."""
        chosen, candidates = (_counts(bits, self.n_blocks, self.starts) for bits in (self.bits, self.candidates))
        return (chosen / np.maximum(1, candidates))[np.searchsorted(self.starts, edges, side="right") - 1]


@dataclass(frozen=True)
class Likeness:
    """How alike two sets A and B are; NaN where one of them is empty."""

    overlap: float
    """|A∩B| / |A∪B| (Jaccard)."""
    cosine: float
    """|A∩B| / sqrt(|A||B|): the cosine of their indicator vectors, the paper's measure."""
    by_chance: float
    """The expected cosine of random sets of the same sizes, each chosen from its candidates C, stretch by stretch; with
    a single stretch, it is sqrt(|A||B|) |C_A∩C_B| / (|C_A||C_B|)."""


def compare(a: BlockSet, b: BlockSet) -> Likeness:
    """Compare two sets. ValueError where their corpora differ in size."""
    if a.n_blocks != b.n_blocks:
        raise ValueError(f"sets of blocks of corpora of {a.n_blocks} and {b.n_blocks} blocks cannot be compared")
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
    """Count the blocks that are marked in each of the stretches between `starts`."""
    return np.add.reduceat(np.unpackbits(bits, count=n_blocks), starts[:-1], dtype=np.int64)
