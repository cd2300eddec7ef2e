"""A plan: the segments of a run, laid out one after another, so that every phase's length is known at its start."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.blend import Blend, BlendSelection
from megatron_lfr.lfr.chain import find_chain
from megatron_lfr.lfr.guard import as_review
from megatron_lfr.lfr.left_out import Scores, Selection
from megatron_lfr.lfr.phase import Phase
from megatron_lfr.lfr.scope import Scope, ScopedSelection, make_scoped_order, outside
from megatron_lfr.lfr.scores import NO_ARRAYS, Arrays
from megatron_lfr.lfr.selection import Order
from megatron_lfr.lfr.weights import count_in

AnySelection = Selection | BlendSelection | ScopedSelection


@dataclass(frozen=True)
class PlannedPhase:
    """A phase laid out in its run: `samples` samples in `steps` optimizer steps from `first_step` on.

    index: its number in the run; segment: that of its segment. corpora: the numbers of those that it trains on; None:
    all of its segment. passes_of: the phase whose passes it goes on with, after `earlier` of their samples, where a
    Learn goes on over the same blocks in a new segment; else its own index.
    """

    index: int
    phase: Phase
    samples: int
    first_step: int
    steps: int
    global_batch_size: int
    segment: int = 0
    corpora: tuple[int, ...] | None = None
    passes_of: int = 0
    earlier: int = 0

    @property
    def end_step(self) -> int:
        return self.first_step + self.steps


@dataclass(frozen=True)
class Segment:
    """A stretch of training with one set of blocks, phases and batch size.

    blend: all of its corpora, of which the first `old_corpora` are those of the segments before.
    """

    phases: tuple[PlannedPhase, ...]
    blend: Blend
    global_batch_size: int
    old_corpora: int = 0

    @property
    def n_blocks(self) -> int:
        return self.blend.starts[-1]

    @property
    def old_blocks(self) -> int:
        """Number of the blocks that the segments before had."""
        return self.blend.starts[self.old_corpora]

    @property
    def end_step(self) -> int:
        return self.phases[-1].end_step

    def scope(self, planned: PlannedPhase) -> Scope:
        """Return the corpora that a phase is about."""
        return Scope(self.blend, range(len(self.blend.sizes)) if planned.corpora is None else planned.corpora)

    def sampled_apart(self, planned: PlannedPhase) -> list[list[tuple[int, int]]]:
        """Return what a phase samples from, each part by itself: ranges of block ids."""
        scope = self.scope(planned)
        parts = [scope.ranges]
        if planned.corpora is not None and planned.phase.replayed(planned.samples):
            parts.append(Scope(self.blend, outside(planned.corpora, self.blend)).ranges)
        phases = [planned.phase, *([as_review(planned.phase)] if planned.phase.may_be_declined else [])]
        if not any(map(self.blend.is_sampled_apart, phases)):
            return parts
        return [[one] for part in parts for one in part]

    def make_order(
        self, planned: PlannedPhase, scores: Scores, seed: int, arrays: Arrays, declined: Collection[int]
    ) -> tuple[Order, AnySelection | None]:
        """Return the block ids [samples] of a phase, in the order in which they are trained on, and what a Focus left
        out. scores: fp32 of the run's blocks, of which later segments may have more; arrays: those that phases name;
        declined: the Focus phases in whose place there was a Review; see `selection.make_order`."""
        phase, samples, known = planned.phase, planned.samples, scores[: self.n_blocks]
        counting = count_in(planned, self, arrays, declined)
        if planned.corpora is None and len(known) == len(scores):
            return self.blend.make_order(phase, scores, samples, seed, planned.index, counting)
        if planned.corpora is None:
            order, selection = self.blend.make_order(phase, known, samples, seed, planned.index, counting)
            return order, None if selection is None else ScopedSelection(selection, self.scope(planned), len(scores))
        others = outside(planned.corpora, self.blend)
        rest = Scope(self.blend, others) if others else None
        return make_scoped_order(self.scope(planned), rest, phase, scores, samples, seed, planned.index, counting)


@dataclass(frozen=True)
class Plan:
    """The segments of a run. Earlier ones are frozen: each one's blocks are the first of the next one's."""

    segments: tuple[Segment, ...]
    seq_length: int
    phases: tuple[PlannedPhase, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(p for segment in self.segments for p in segment.phases))

    @property
    def n_blocks(self) -> int:
        """Number of all blocks, which those of the last segment are."""
        return self.segments[-1].n_blocks

    @property
    def global_batch_size(self) -> int:
        """That of the last segment; each phase has its own."""
        return self.segments[-1].global_batch_size

    @property
    def batch_sizes(self) -> list[int]:
        """The global batch sizes of the segments, each one once, in the order of the first."""
        return list(dict.fromkeys(segment.global_batch_size for segment in self.segments))

    @property
    def total_steps(self) -> int:
        return self.phases[-1].end_step

    @property
    def total_samples(self) -> int:
        return sum(planned.samples for planned in self.phases)

    @cached_property
    def _first_steps(self) -> list[int]:
        return [planned.first_step for planned in self.phases]

    def at_step(self, step: int) -> PlannedPhase:
        """Return the phase that optimizer step `step` (from 0) belongs to."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside the plan's {self.total_steps} steps")
        return self.phases[bisect.bisect_right(self._first_steps, step) - 1]

    def samples_before(self, step: int) -> int:
        """Return how many samples the first `step` steps train on."""
        return sum(
            min(planned.samples, max(0, step - planned.first_step) * planned.global_batch_size)
            for planned in self.phases
        )

    def first(self, segments: int) -> Plan:
        """Return the plan of the first `segments` segments."""
        return Plan(self.segments[:segments], self.seq_length)

    def in_scope(self, planned: PlannedPhase) -> npt.NDArray[np.bool_]:
        """Return a mask [n_blocks] of the blocks that a phase is about."""
        return self.segments[planned.segment].scope(planned).contains(self.n_blocks)

    def make_order(
        self,
        planned: PlannedPhase,
        scores: Scores,
        seed: int,
        arrays: Arrays = NO_ARRAYS,
        declined: Collection[int] = (),
    ) -> tuple[Order, AnySelection | None]:
        """Make the order of a phase, given the arrays of its segment; see `Segment.make_order`. ValueError names the
        phase of which no order can be made."""
        try:
            return self.segments[planned.segment].make_order(planned, scores, seed, arrays, declined)
        except ValueError as error:
            raise ValueError(f"phase {planned.index}: {error}") from None


def append_segment(
    past: Plan | None,
    phases: Sequence[Phase],
    samples: Sequence[int],
    corpora: Sequence[tuple[int, ...] | None],
    blend: Blend,
    seq_length: int,
    global_batch_size: int,
) -> Plan:
    """Lay phases out as one more segment after those of `past`, given the samples and the corpora of each.

    ValueError where the blocks of `past` are not the first of `blend`.
    """
    before = () if past is None else past.segments
    old = before[-1].blend.starts if before else [0]
    if list(blend.starts[: len(old)]) != list(old):
        raise ValueError(f"the first corpora must be those of the segments before: {list(old)}, not {blend.starts}")
    planned: list[PlannedPhase] = []
    previous = past.phases[-1] if past else None
    first_index, first_step = (previous.index + 1, previous.end_step) if previous else (0, 0)
    for index, (phase, count, chosen) in enumerate(zip(phases, samples, corpora, strict=True), first_index):
        steps = -(-count // global_batch_size)
        planned.append(
            PlannedPhase(index, phase, count, first_step, steps, global_batch_size, len(before), chosen, index)
        )
        first_step += steps
    if before and _goes_on(before[-1], planned[0], blend):
        last = before[-1].phases[-1]
        chain = find_chain(last, before[-1])
        planned[0] = replace(planned[0], passes_of=chain.first, earlier=sum(chain.taken) + last.samples)
    return Plan((*before, Segment(tuple(planned), blend, global_batch_size, len(old) - 1)), seq_length)


def _goes_on(before: Segment, first: PlannedPhase, blend: Blend) -> bool:
    """Whether a segment's first phase goes on with the passes of the one before: both Learn from the same blocks, each
    of which counts the same."""
    last = before.phases[-1]
    is_same = list(before.blend.starts) == list(blend.starts) and before.blend.weights is None and blend.weights is None
    return is_same and all(
        one.phase.kind == "learn" and one.corpora is None and one.phase.counts_equally for one in (last, first)
    )
