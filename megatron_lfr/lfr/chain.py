"""Chains: the Learn and Review phases that go through the blocks together, each where the one before it stopped."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lfr.lfr.plan import PlannedPhase, Segment


@dataclass(frozen=True)
class Chain:
    """Where a phase is in its chain.

    first: the phase that the chain began with, which gives the seed. taken: how many samples the phases of the chain
    took before this one, one by one; those of earlier segments as one number.
    """

    first: int
    taken: tuple[int, ...] = ()

    def map(self, count: Callable[[int], int]) -> Chain:
        """Return the chain of a part of the blocks, given how many of a phase's samples are of that part."""
        return Chain(self.first, tuple(map(count, self.taken)))


def find_chain(planned: PlannedPhase, segment: Segment, declined: Collection[int] = ()) -> Chain:
    """Return the chain of a Learn or Review, or of the Review in the place of a Focus: one of its own where it begins
    anew.

    A Learn that goes on with the segment before says so itself (`PlannedPhase.earlier`). Otherwise, a chain ends
    before a phase whose blocks count otherwise. It passes over every Focus, but for those in `declined`, the numbers
    of the ones in whose place there was a Review.
    """
    if planned.earlier:
        return Chain(planned.passes_of, (planned.earlier,))
    if planned.phase.passes == "anew":
        return Chain(planned.passes_of)
    first, taken = planned, []
    for other in reversed(segment.phases[: planned.index - segment.phases[0].index]):
        is_random = other.phase.kind != "focus" or other.index in declined
        if other.corpora != planned.corpora or not is_random:
            continue
        if not _count_alike(other, planned):
            break
        first = other
        taken.append(other.earlier + other.samples - other.phase.replayed(other.samples))
        if other.phase.passes == "anew":
            break
    return Chain(first.passes_of, tuple(taken))


def _count_alike(one: PlannedPhase, other: PlannedPhase) -> bool:
    if one.phase.counts_equally:
        return other.phase.counts_equally
    fields = ("weight", "weight_power", "weight_cap", "copies")
    return all(getattr(one.phase, field) == getattr(other.phase, field) for field in fields)
