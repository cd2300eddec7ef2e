"""The ledger: the last loss of every block, derived from the journal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.lfr.blend import Blend
from megatron_lfr.lfr.journal import UNRECORDED
from megatron_lfr.lfr.plan import Plan
from megatron_lfr.lfr.reference import LARGEST, Curves, Population, Reference
from megatron_lfr.lfr.selection import has_score

_CHUNK = 1 << 16
_SORTED = 1 << 22  # entries that are sorted at a time
_SPREADS = 3.29
"""Standard deviations between the 5 % and the 95 % quantile of a normal distribution."""


class Ledger:
    """Keeps the last loss of each block, the step at which it was recorded, and the number of visits: 10 bytes a block,
    and 2 more in a Focus; where a phase ranks by improvement, also the loss before it and its step: 8 more.

    Attributes:
        nll: fp32 [n_blocks], mean negative log-likelihood a token (nats) when the block was last trained on; NaN
            if it never was.
        step: int32 [n_blocks], optimizer step of that record; -1 where there is none.
        visits: uint16 [n_blocks], how often the block was trained on, saturating.
        previous_nll, previous_step: fp32 and int32 [n_blocks], loss and step of the visit before the last one, as `nll`
            and `step`; empty unless `keep_previous`.
        references: what the losses of each step are measured against, one for the new blocks of each segment: where
            a phase is about new blocks, its losses say nothing of how hard the others are now.
        declined: the numbers of the Focus phases in whose place there was a Review.

    blends: those of the segments, which say how Learn and Review sample from corpora with weights; without any, there
    is one segment.
    """

    def __init__(self, n_blocks: int, total_steps: int, *blends: Blend, keep_previous: bool = False) -> None:
        self._blends = blends or (Blend([0, n_blocks]),)
        self._starts = sorted({0, *(blend.starts[-1] for blend in self._blends)})
        self.nll = np.full(n_blocks, np.nan, np.float32)
        self.step = np.full(n_blocks, -1, np.int32)
        self.visits = np.zeros(n_blocks, np.uint16)
        self._keeps_previous = keep_previous
        self.previous_nll = np.full(n_blocks if keep_previous else 0, np.nan, np.float32)
        self.previous_step = np.full(n_blocks if keep_previous else 0, -1, np.int32)
        self.references = [Reference(total_steps) for _ in pairwise(self._starts)]
        self.declined: set[int] = set()
        self._priors: npt.NDArray[np.float16] | None = None

    @staticmethod
    def of(plan: Plan) -> Ledger:
        """Return the ledger of a run before its first step."""
        blends = (segment.blend for segment in plan.segments)
        return Ledger(plan.n_blocks, plan.total_steps, *blends, keep_previous=_needs_previous(plan))

    @staticmethod
    def bytes_of(plan: Plan) -> int:
        """Return the memory of a run's ledger, without the 2 bytes a block more in a Focus."""
        return plan.n_blocks * (18 if _needs_previous(plan) else 10)

    def n_blocks(self, segment: int) -> int:
        """Return the number of blocks of a segment; those of later ones come after them."""
        return self._blends[segment].starts[-1]

    def of_all(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return values of a segment's blocks as values of all blocks: NaN for those of later segments."""
        missing = len(self.nll) - len(values)
        return np.pad(values, (0, missing), constant_values=np.nan) if missing else values

    def begin_phase(
        self, first_step: int, focus: bool, scores: npt.NDArray[np.float32] | None = None, segment: int = 0
    ) -> None:
        """Begin a phase of a segment at `first_step`, when all steps before it are recorded. Without a call, all steps
        count as one phase that samples at random.

        focus: whether the phase samples blocks by difficulty, as given by the records or, where there are any, by other
        `scores` fp32 [n_blocks]. Its losses are then those of hard blocks, and are measured accordingly.
        """
        self._priors = None
        blend = self._blends[segment]
        if focus:
            self._priors = self._present_standings() if scores is None else self._standardised(scores, blend)
        for part, reference in self._parts():
            prior = None if self._priors is None else self._population(self._priors, part, blend)
            reference.begin_phase(first_step, prior)

    def record(self, step: int, block_ids: npt.NDArray[np.integer], nll: npt.NDArray[np.float32]) -> None:
        """Enter one optimizer step: fp32 `nll` [n] of `block_ids` [n]. Entries equal to UNRECORDED leave a block as
        it was. Where a block occurs twice, the later entry counts."""
        known = nll != UNRECORDED
        ids = block_ids[known]
        self._enter(ids, nll[known], np.full(len(ids), step, np.int32))
        unique, times = np.unique(ids, return_counts=True)
        self.visits[unique] = np.minimum(self.visits[unique].astype(np.int64) + times, np.iinfo(np.uint16).max)
        self._refer(step, max(1, len(nll)), block_ids, nll, known)

    def record_phase(
        self, first_step: int, batch_size: int, block_ids: npt.NDArray[np.integer], nll: npt.NDArray[np.float32]
    ) -> None:
        """Enter many steps of a phase at once, `batch_size` samples each from `first_step` on (the last may be short).
        The result is the same as that of `record` for each step, to the last bit."""
        known = nll != UNRECORDED
        ids = block_ids[known]
        self._enter(ids, nll[known], first_step + np.flatnonzero(known) // batch_size)
        times = np.zeros(len(self.visits), np.uint32)
        np.add.at(times, ids, np.uint32(1))  # of its own type: with an int, NumPy takes ten times as long
        self.visits = np.minimum(self.visits + times, np.iinfo(np.uint16).max).astype(np.uint16)
        self._refer(first_step, batch_size, block_ids, nll, known)

    def _enter(
        self, ids: npt.NDArray[np.integer], nll: npt.NDArray[np.float32], steps: npt.NDArray[np.integer]
    ) -> None:
        """Enter losses [n] in the order of training as the last ones of their blocks."""
        if self._keeps_previous and len(ids) > _SORTED:
            for first in range(0, len(ids), _SORTED):
                part = slice(first, first + _SORTED)
                self._enter(ids[part], nll[part], steps[part])
            return
        if self._keeps_previous:
            self.previous_nll[ids], self.previous_step[ids] = self.nll[ids], self.step[ids]
            by_block = np.argsort(ids, kind="stable")
            again = by_block[:-1][ids[by_block[:-1]] == ids[by_block[1:]]]  # all entries of a block but its last one
            self.previous_nll[ids[again]], self.previous_step[ids[again]] = nll[again], steps[again]
        self.nll[ids], self.step[ids] = nll, steps  # of several entries of a block, the last one remains

    def _refer(
        self,
        first_step: int,
        batch_size: int,
        block_ids: npt.NDArray[np.integer],
        nll: npt.NDArray[np.float32],
        known: npt.NDArray[np.bool_],
    ) -> None:
        priors = None if self._priors is None else self._priors[block_ids]
        for part, reference in self._parts():
            counted = known
            if len(self.references) > 1:
                counted = known & (block_ids >= part.start) & (block_ids < part.stop)
            reference.add(first_step, batch_size, nll, counted, priors)

    def _parts(self) -> Iterator[tuple[slice, Reference]]:
        """Yield the new blocks of each segment, and what their losses are measured against."""
        for (first, last), reference in zip(pairwise(self._starts), self.references, strict=True):
            yield slice(first, last), reference

    def recorded_scores(self) -> npt.NDArray[np.float32]:
        """Return the loss of each block when it was last trained on, fp32 [n_blocks]: the paper's score."""
        return self.nll.copy()

    def detrended_scores(self) -> npt.NDArray[np.float32]:
        """Return what the recorded loss of each block amounts to now (nats), fp32 [n_blocks], NaN without one (ours).

        The score lies as many spreads above the mean of all blocks' present losses as the recorded loss lay above their
        mean at its step: the model has changed since, and raw losses confound how hard a block is with when it was
        seen. "All blocks" are those that came in the same segment: only their own losses show how the model has moved
        on them, and where there have been none since, it is taken not to have. The module `reference` says how mean and
        spread are estimated. The noise of a record is not taken out: early records have more of it, and would be
        dropped more or less often than others.
        """
        scores = self.nll.copy()
        for curves, part, standing in self._standings(self.nll, self.step):
            location, spread = curves.level
            scores[part] = location + spread * standing
        return scores

    def improvement_scores(self) -> npt.NDArray[np.float32]:
        """Return how much the loss of each block has fallen between its last two visits, beyond what the losses of all
        blocks have (nats), fp32 [n_blocks]; negative where it has risen, NaN for blocks with fewer visits (ours).

        It is what the earlier of both losses amounts to now less what the later one does (see `detrended_scores`), so
        blocks whose visits lie further apart, or further back, are not favoured by the fall of the mean.
        """
        scores = np.full(len(self.nll), np.nan, np.float32)
        before, after = (
            self._standings(nll, step) for nll, step in ((self.previous_nll, self.previous_step), (self.nll, self.step))
        )
        for (curves, part, earlier), (_, _, later) in zip(before, after, strict=True):
            scores[part] = curves.level[1] * (earlier - later)
        return scores

    def shuffled_scores(self, seed: int) -> npt.NDArray[np.float32]:
        """Return the detrended scores, shuffled among the blocks that have one: a control without difficulty (ours)."""
        scores = self.detrended_scores()
        seen = np.flatnonzero(~np.isnan(scores))
        scores[seen] = scores[seen][_C.permutation(len(seen), seed)]
        return scores

    def _standings(
        self, nll: npt.NDArray[np.float32], steps: npt.NDArray[np.int32]
    ) -> Iterator[tuple[Curves, slice, npt.NDArray[np.float64]]]:
        """Yield, for one chunk of blocks after another, how many spreads their records `nll` [n_blocks] lie above the
        mean of their `steps`, NaN without a record; and the curves that have these means."""
        for blocks, reference in self._parts():
            curves = reference.curves()
            for part in _chunks(blocks) if len(curves.spread) else ():
                step = steps[part]  # -1 reads the last step, but the loss is NaN then
                standing = (nll[part].astype(np.float64) - curves.location[step]) / curves.spread[step]
                yield curves, part, np.clip(standing, -LARGEST, LARGEST)

    def _present_standings(self) -> npt.NDArray[np.float16]:
        standings = np.full(len(self.nll), np.nan, np.float16)
        for _, part, values in self._standings(self.nll, self.step):
            standings[part] = values
        return standings

    def _standardised(self, scores: npt.NDArray[np.float32], blend: Blend) -> npt.NDArray[np.float16]:
        """Express scores [n_blocks] as spreads above their mean."""
        standings = np.empty(len(scores), np.float16)
        for blocks, _ in self._parts():
            population = self._population(scores, blocks, blend)
            spread = math.sqrt(population.variance) or 1.0
            for part in _chunks(blocks):
                values = (scores[part].astype(np.float64) - population.mean) / spread
                standings[part] = np.clip(values, -LARGEST, LARGEST)
        return standings

    def _population(self, values: npt.NDArray[np.floating], blocks: slice, blend: Blend) -> Population:
        """Summarize the values of some blocks as Learn and Review sample them."""
        inside = [corpus for corpus, first in enumerate(blend.starts[:-1]) if blocks.start <= first < blocks.stop]
        if blend.weights is None or not inside:
            return Population.of_corpora(values, [blocks.start, blocks.stop], [1.0])
        first, last = inside[0], inside[-1] + 1
        return Population.of_corpora(values, blend.starts[first : last + 1], blend.weights[first:last])


def _needs_previous(plan: Plan) -> bool:
    return any(planned.phase.needs_two_visits for planned in plan.phases)


def _chunks(blocks: slice) -> Iterator[slice]:
    """Yield slices of at most _CHUNK blocks."""
    for first in range(blocks.start, blocks.stop, _CHUNK):
        yield slice(first, min(first + _CHUNK, blocks.stop))


def of_unit_spread(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Shift and scale scores of any unit, NaN where there is none, so that a spread of the middle ones is 1.

    Losses have a spread near 1 and need none of it; a `Population` is for numbers of that size. All from exact order
    statistics and single IEEE operations.
    """
    low, middle, high = _C.percentiles(scores, (0.05, 0.5, 0.95)).tolist() if has_score(scores) else (0.0,) * 3
    spread = (high - low) / _SPREADS or 1.0
    scaled = np.empty(len(scores), np.float32)
    for first in range(0, len(scores), _CHUNK):
        part = slice(first, first + _CHUNK)
        scaled[part] = np.clip((scores[part].astype(np.float64) - middle) / spread, -LARGEST, LARGEST)
    return scaled
