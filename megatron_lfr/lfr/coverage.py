"""How many blocks have a score when a phase begins, as far as that follows from the plan alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lfr.lfr.blend import Blend
    from megatron_lfr.lfr.schedule import Phase


class Coverage:
    """Bounds the number of scored blocks, phase by phase, under the assumption that no step is skipped.

    Learn and Review train on complete passes and a part of one, over each corpus by its quota where a blend has
    weights. So the number of different blocks is exact after the first of them, and after one that covers a corpus;
    after others, and after a Focus that keeps unseen blocks, only bounds are known.
    """

    def __init__(self, n_blocks: int, blend: Blend | None) -> None:
        self._blend = blend if blend is not None and blend.weights is not None else None
        self._per_corpus = blend is not None and blend.focus_scope == "per-corpus"
        self._sizes = [n_blocks] if self._blend is None else self._blend.sizes
        self._fewest = [0] * len(self._sizes)
        self._most = [0] * len(self._sizes)

    def add(self, phase: Phase, samples: int) -> None:
        """Update the bounds by a phase of `samples` samples."""
        quotas = [samples] if self._blend is None else self._blend.quotas(samples)
        if phase.kind != "focus":
            for corpus, quota in enumerate(quotas):
                self._draw_uniformly(corpus, quota, phase.counts_equally)
        elif self._covers_all(phase, samples):
            self._fewest, self._most = list(self._sizes), list(self._sizes)
        elif phase.keeps_unseen or phase.scores_all or phase.explore:
            self._most = [min(size, most + samples) for size, most in zip(self._sizes, self._most, strict=True)]
        elif self._per_corpus:  # a corpus without a score is sampled uniformly
            for corpus, quota in enumerate(quotas):
                if self._blend is None:
                    self._most[corpus] = min(self._sizes[corpus], self._most[corpus] + quota)
                elif self._most[corpus] == 0:
                    self._draw_uniformly(corpus, quota, phase.counts_equally)

    def kept(self, phase: Phase) -> int:
        """Return how many blocks a Focus keeps if it drops exactly its share. Where the number of unseen blocks is not
        known, this is a lower bound if the phase keeps them, and a ValueError if it leaves them out."""
        sizes, fewest, most = self._sizes, self._fewest, self._most
        if not self._per_corpus:  # the share is of all blocks together
            sizes, fewest, most = [sum(sizes)], [sum(fewest)], [sum(most)]
        if phase.scores_all:
            fewest = most = sizes
        if phase.keeps_unseen:
            return max(1, sum(sizes) - sum(_dropped(phase, scored) for scored in most))
        if fewest != most:
            raise ValueError(
                f"unit passes, unseen {phase.unseen}: leaves out blocks that have no score, and how many have one "
                f"is not known before the run: {sum(fewest)} to {sum(most)} of {sum(sizes)}. Give the duration in "
                "epochs or steps, or unseen: keep, or begin with a learn phase of one epoch or more"
            )
        return max(1, sum(scored - _dropped(phase, scored) for scored in fewest))

    def _draw_uniformly(self, corpus: int, quota: int, in_passes: bool) -> None:
        size = self._sizes[corpus]
        if not in_passes:  # by weights, or as one of copies: some blocks may come again before others come at all
            self._most[corpus] = min(size, self._most[corpus] + quota)
            return
        self._fewest[corpus] = min(size, max(self._fewest[corpus], quota))
        self._most[corpus] = size if quota >= size else min(size, self._most[corpus] + quota)

    def _covers_all(self, phase: Phase, samples: int) -> bool:
        """Whether a Focus trains on every unseen block, as in a complete pass over the blocks that it keeps."""
        if not phase.keeps_unseen or phase.sampling == "visits" or self._per_corpus or phase.explore:
            return False
        if not phase.counts_equally:
            return False
        dropped = 0
        if phase.selection == "threshold" and phase.sampling == "passes" and not phase.scores_all:
            dropped = _dropped(phase, sum(self._fewest))
        return samples >= sum(self._sizes) - dropped


def _dropped(phase: Phase, scored: int) -> int:
    return dropped_count(phase.drop, scored) + dropped_count(phase.drop_hardest, scored)


def dropped_count(drop: float, n_scored: int) -> int:
    """Return how many of `n_scored` blocks a drop share leaves out. The slack, which csrc has too, undoes the rounding
    of decimal shares: 0.7 of 10 is 7, not 6.999..."""
    product = drop * n_scored
    return math.floor(product + max(1e-9, product * 2.0**-51))
