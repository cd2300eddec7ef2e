"""What a Focus leaves out: by cuts of the score, or complete clusters of content."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.phase import Phase

Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Selection:
    """What a Focus left out: the scored blocks below `cut` and above `cut_hardest`, and the unscored ones if
    `excludes_unseen`.

    The first `tie_quota` blocks, by id, whose score equals `cut` are dropped too, and the last `tie_quota_hardest` of
    those whose score equals `cut_hardest`, so that a threshold drops exact shares. dropped: blocks at both ends.
    """

    cut: float
    tie_quota: int
    excludes_unseen: bool
    dropped: int
    unseen: int
    n_blocks: int
    cut_hardest: float = np.inf
    tie_quota_hardest: int = 0
    dropped_hardest: int = 0

    @property
    def dropped_share(self) -> float:
        """Share of the scored blocks that were dropped."""
        return self.dropped / max(1, self.n_blocks - self.unseen)

    def easiest(self, scores: Scores) -> npt.NDArray[np.bool_]:
        """Return a mask of the blocks that are left out as easy, given the scores that the phase was made from."""
        mask: npt.NDArray[np.bool_] = scores < self.cut
        mask[np.flatnonzero(scores == np.float32(self.cut))[: self.tie_quota]] = True
        return mask

    def left_out(self, scores: Scores) -> npt.NDArray[np.bool_]:
        """Return a mask of the blocks that the phase leaves out, given the scores that it was made from. What it draws
        at random (explore) may be among them."""
        mask = self.easiest(scores)
        if self.dropped_hardest:
            mask |= scores > self.cut_hardest
            ties = np.flatnonzero(scores == np.float32(self.cut_hardest))
            mask[ties[len(ties) - self.tie_quota_hardest :]] = True
        if self.excludes_unseen:
            mask |= np.isnan(scores)
        return mask


@dataclass(frozen=True, kw_only=True)
class ContentSelection(Selection):
    """What a Focus left out by complete clusters of content: of the scored blocks, those whose cluster is easy or hard.

    clusters: uint32 [n_blocks], the number of each block's cluster. easy, hard: masks [clusters]. There are no cuts.
    """

    clusters: npt.NDArray[np.uint32]
    easy: Mask
    hard: Mask

    def easiest(self, scores: Scores) -> Mask:
        return self.easy[self.clusters] & ~np.isnan(scores)

    def left_out(self, scores: Scores) -> Mask:
        unseen = np.isnan(scores)
        return np.where(unseen, self.excludes_unseen, (self.easy | self.hard)[self.clusters])


def drop_content_clusters(phase: Phase, scores: Scores, clusters: npt.NDArray[np.uint32]) -> ContentSelection:
    """Decide which clusters to drop at both ends, by the mean score of each; of equal ones the lower number is the
    easier one. As many as make up at most that share of the scored blocks are dropped, and never all that have one."""
    size = int(clusters.max()) + 1
    counts, sums = np.zeros(size, np.int64), np.zeros(size)
    for first in range(0, len(scores), _CHUNK):
        part = slice(first, first + _CHUNK)
        seen = ~np.isnan(scores[part])
        np.add.at(counts, clusters[part][seen], 1)
        np.add.at(sums, clusters[part][seen], scores[part][seen].astype(np.float64))  # in the order of the blocks
    known = np.flatnonzero(counts)
    ranked = known[np.argsort(sums[known] / counts[known], kind="stable")]
    easiest = droppable(counts[ranked], phase.drop)
    hardest = min(droppable(counts[ranked][::-1], phase.drop_hardest), len(ranked) - easiest - 1)
    easy, hard = np.zeros((2, size), np.bool_)
    easy[ranked[:easiest]] = True
    hard[ranked[len(ranked) - hardest :]] = True
    dropped_hardest = int(counts[hard].sum())
    return ContentSelection(
        cut=-np.inf,
        tie_quota=0,
        excludes_unseen=not phase.keeps_unseen,
        dropped=int(counts[easy].sum()) + dropped_hardest,
        unseen=len(scores) - int(counts.sum()),
        n_blocks=len(scores),
        dropped_hardest=dropped_hardest,
        clusters=clusters,
        easy=easy,
        hard=hard,
    )


def droppable(counts: npt.NDArray[np.int64], drop: float) -> int:
    """Return how many of the first clusters to drop: as many as make up at most `drop` of the blocks, never all."""
    share = np.cumsum(counts) / counts.sum()
    return min(int((share <= drop + 1e-9).sum()), len(counts) - 1)
