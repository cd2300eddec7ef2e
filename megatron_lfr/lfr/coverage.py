"""How many blocks have a score when a phase begins, as far as that follows from the plan alone."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from megatron_lfr.lfr.blend import Blend
from megatron_lfr.lfr.phase import Phase
from megatron_lfr.lfr.scope import Scope, outside

Corpora = Sequence[int] | None
"""The numbers of the corpora that a phase is about; None for all."""


class Coverage:
    """Bounds the number of scored blocks, phase by phase, under the assumption that no step is skipped.

    Learn and Review train on complete passes and a part of one, over each corpus by its quota where a blend has
    weights. So the number of different blocks is exact after the first of them, and after one that covers a corpus;
    after others, and after a Focus that keeps unseen blocks, only bounds are known.

    Blocks are counted in parts, `starts[i]` to before `starts[i + 1]`: the new blocks of each segment, and where a
    blend has weights or a phase has a scope, each corpus.
    """

    def __init__(self) -> None:
        self._starts = [0]
        self._fewest: list[int] = []
        self._most: list[int] = []

    def begin_segment(self, blend: Blend) -> None:
        """Begin a segment with the corpora of `blend`, of which the first are those of the segment before."""
        self._blend = blend
        self._per_corpus = blend.focus_scope == "per-corpus"
        if blend.starts[-1] > self._starts[-1]:
            self._starts.append(blend.starts[-1])
            self._fewest.append(0)
            self._most.append(0)
        if blend.weights is not None:
            self._split(blend.starts)

    def add(self, phase: Phase, samples: int, corpora: Corpora = None) -> None:
        """Update the bounds by a phase of `samples` samples."""
        parts = self._parts(corpora)
        may_take_any = phase.keeps_unseen or phase.explore or phase.may_be_declined
        if phase.kind != "focus":
            others = phase.replayed(samples)
            self._sample_everything(phase, parts, samples - others, corpora)
            if others and corpora is not None:
                rest = outside(corpora, self._blend)
                self._sample_everything(phase, self._parts(rest), others, rest)
        elif self._covers_all(phase, samples, parts):
            for part in parts:
                self._fewest[part] = self._most[part] = self._size(part)
        elif self._per_corpus and not may_take_any:
            self._sample_unscored(phase, parts, samples, corpora)  # uniformly from a corpus without a score
        elif may_take_any or phase.may_score_unseen:
            for part in parts:
                self._most[part] = min(self._size(part), self._most[part] + samples)

    def most_scored(self, corpora: Corpora = None) -> int:
        """Return how many blocks of some corpora can have been trained on at most."""
        return sum(self._most[part] for part in self._parts(corpora))

    def kept(self, phase: Phase, corpora: Corpora = None) -> int:
        """Return how many blocks a Focus keeps if it drops exactly its share. Where the number of unseen blocks is not
        known, this is a lower bound if the phase keeps them, and a ValueError if it leaves them out."""
        parts = self._parts(corpora)
        sizes, fewest, most = ([values[part] for part in parts] for values in (self._sizes(), self._fewest, self._most))
        if not self._per_corpus:  # the share is of all blocks together
            sizes, fewest, most = [sum(sizes)], [sum(fewest)], [sum(most)]
        if phase.scores_all:
            fewest = most = sizes
        elif not phase.scores_seen:
            fewest = [0] * len(sizes)
            most = most if phase.needs_two_visits else sizes
        if phase.keeps_unseen:
            return max(1, sum(sizes) - sum(_dropped(phase, scored) for scored in most))
        if fewest != most:
            raise ValueError(
                f"unit passes, unseen {phase.unseen}: leaves out blocks that have no score, and how many have one "
                f"is not known before the run: {sum(fewest)} to {sum(most)} of {sum(sizes)}. Give the duration in "
                "epochs or steps, or unseen: keep, or begin with a learn phase of one epoch or more"
            )
        return max(1, sum(scored - _dropped(phase, scored) for scored in fewest))

    def _size(self, part: int) -> int:
        return self._starts[part + 1] - self._starts[part]

    def _sizes(self) -> list[int]:
        return [self._size(part) for part in range(len(self._fewest))]

    def _parts(self, corpora: Corpora) -> list[int]:
        """Return the parts of some corpora; each of these is split off where it is not a part yet."""
        if corpora is None:
            return list(range(len(self._fewest)))
        ranges = Scope(self._blend, corpora).ranges
        self._split([edge for one in ranges for edge in one])
        return [part for part, first in enumerate(self._starts[:-1]) if any(a <= first < b for a, b in ranges)]

    def _split(self, edges: Sequence[int]) -> None:
        """Split parts at `edges`. What was known of a part that was neither empty nor complete becomes bounds."""
        for edge in edges:
            part = bisect.bisect_right(self._starts, edge) - 1
            if self._starts[part] == edge:
                continue
            unscored = self._size(part) - self._fewest[part]
            most = self._most[part]
            self._starts.insert(part + 1, edge)
            sizes = [self._size(part), self._size(part + 1)]
            self._fewest[part : part + 1] = [max(0, size - unscored) for size in sizes]
            self._most[part : part + 1] = [min(size, most) for size in sizes]

    def _sample_everything(self, phase: Phase, parts: Sequence[int], samples: int, corpora: Corpora) -> None:
        if self._blend.weights is not None:
            quotas = Scope(self._blend, self._corpora(corpora)).blend.quotas(samples)
            for part, quota in zip(parts, quotas, strict=True):
                self._sample_part(phase, part, quota)
        elif len(parts) == 1 or not phase.counts_equally:
            for part in parts:
                self._sample_part(phase, part, samples)
        else:  # passes over all parts together: a part of one has any share of each
            size = sum(map(self._size, parts))
            for part in parts:
                at_least = max(0, self._size(part) - max(0, size - samples))
                self._fewest[part] = max(self._fewest[part], at_least)
                self._most[part] = min(self._size(part), self._most[part] + samples)

    def _sample_unscored(self, phase: Phase, parts: Sequence[int], samples: int, corpora: Corpora) -> None:
        quotas = [samples] * len(parts)
        if self._blend.weights is not None:
            quotas = Scope(self._blend, self._corpora(corpora)).blend.quotas(samples)
        for part, quota in zip(parts, quotas, strict=True):
            if self._blend.weights is None or not phase.scores_seen:  # which corpus has no score, is not known
                self._most[part] = min(self._size(part), self._most[part] + quota)
            elif self._most[part] == 0:
                self._sample_part(phase, part, quota)

    def _corpora(self, corpora: Corpora) -> Sequence[int]:
        return range(len(self._blend.sizes)) if corpora is None else corpora

    def _sample_part(self, phase: Phase, part: int, quota: int) -> None:
        size = self._size(part)
        if not phase.counts_equally:  # some blocks may come again before others come at all
            self._most[part] = min(size, self._most[part] + quota)
            return
        self._fewest[part] = min(size, max(self._fewest[part], quota))
        self._most[part] = size if quota >= size else min(size, self._most[part] + quota)

    def _covers_all(self, phase: Phase, samples: int, parts: Sequence[int]) -> bool:
        """Whether a Focus trains on every unseen block, as in a complete pass over the blocks that it keeps."""
        if not phase.keeps_unseen or phase.sampling == "visits" or self._per_corpus or phase.explore:
            return False
        if not phase.counts_equally or phase.may_be_declined:
            return False
        if phase.may_score_unseen and (phase.drop or phase.drop_hardest):  # drops what was never trained on, too
            return False
        dropped = 0
        if phase.selection == "threshold" and phase.sampling == "passes" and phase.scores_seen:
            dropped = _dropped(phase, sum(self._fewest[part] for part in parts))
        return samples >= sum(map(self._size, parts)) - dropped


def _dropped(phase: Phase, scored: int) -> int:
    return dropped_count(phase.drop, scored) + dropped_count(phase.drop_hardest, scored)


def dropped_count(drop: float, n_scored: int) -> int:
    """Return how many of `n_scored` blocks a drop share leaves out. The slack, which csrc has too, undoes the rounding
    of decimal shares: 0.7 of 10 is 7, not 6.999..."""
    product = drop * n_scored
    return math.floor(product + max(1e-9, product * 2.0**-51))
