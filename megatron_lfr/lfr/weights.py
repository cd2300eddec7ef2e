"""How much a block counts in a phase: by its score, by a weight from outside of the run, as one of several copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.chain import Chain, find_chain
from megatron_lfr.lfr.scores import COPIES, Arrays, is_file

if TYPE_CHECKING:
    from megatron_lfr.lfr.phase import Phase
    from megatron_lfr.lfr.plan import PlannedPhase, Segment

Weights = Literal["auto", "uniform", "capped", "perplexity"]
CountedCopies = Literal["once", "log", "all"]
NO_WEIGHT = "none"
T = TypeVar("T", bound=np.generic)

_LARGEST_POWER = 16.0
_UNIT = 65536.0
_CHUNK = 1 << 22


def check_weighting(phase: Phase) -> None:
    """Raise ValueError for a phase whose tails, weights, exploration or copies are illegal, or do not go together."""
    if not (math.isfinite(phase.drop_hardest) and phase.drop_hardest >= 0 and phase.drop + phase.drop_hardest < 1):
        raise ValueError(
            f"phase drop_hardest {phase.drop_hardest}: must be at least 0, and below 1 together with drop {phase.drop}"
        )
    if not 0 <= phase.explore < 1:
        raise ValueError(f"phase explore {phase.explore}: must be at least 0 and below 1")
    if not 0 < phase.weight_power <= _LARGEST_POWER:
        raise ValueError(f"phase weight_power {phase.weight_power}: must be above 0, and at most {_LARGEST_POWER:g}")
    if not 1 <= phase.weight_cap < math.inf:
        raise ValueError(f"phase weight_cap {phase.weight_cap}: must be at least 1 and finite")
    if phase.weight != NO_WEIGHT and not is_file(phase.weight):
        raise ValueError(f"phase weight {phase.weight!r}: choose from {NO_WEIGHT}, file:NAME")
    if phase.kind == "focus":
        if phase.copies != "all":
            raise ValueError(f"phase copies {phase.copies}: only a learn or review phase counts copies; use weight")
        if phase.sampling == "passes" and phase.weights in ("capped", "perplexity"):
            raise ValueError(
                f"phase weights {phase.weights}: a pass visits every kept block once; use sampling visits or choice"
            )
    else:
        for field in ("drop_hardest", "explore"):
            if value := getattr(phase, field):
                raise ValueError(f"phase {field} {value}: only a focus phase has it, but this one is {phase.kind}")
    if phase.unit == "passes" and (phase.weight != NO_WEIGHT or phase.copies != "all"):
        raise ValueError(
            "phase unit passes: a pass has no fixed length with weight or copies; use epochs, steps or share"
        )


def as_begun(phases: Sequence[Phase], begun: Sequence[Phase], of_preset: bool = False) -> tuple[Phase, ...]:
    """Return phases as a run was begun with them, before their weights could be chosen, before those of a preset were
    capped, before the Reviews of one went on with passes, and before a Focus of one could be declined. begun: the
    phases of that run; none before it has begun."""
    if len(phases) != len(begun):
        return tuple(phases)
    return tuple(_as_begun(phase, old, of_preset) for phase, old in zip(phases, begun, strict=True))


def _as_begun(phase: Phase, old: Phase, of_preset: bool) -> Phase:
    if (phase.weights == "auto" or of_preset) and old.weights == first_weights(phase.sampling):
        phase = replace(phase, weights=old.weights)
    if of_preset and old.passes == "anew":
        phase = replace(phase, passes="anew", least_scored=old.least_scored, guard=old.guard)
    return phase


def first_weights(sampling: str) -> Weights:
    """Return the weights that `sampling` had before they could be chosen."""
    return "auto" if sampling == "passes" else "perplexity"


@dataclass(frozen=True)
class Counting:
    """What makes blocks count differently in a phase, whatever their scores. None of it: every block counts the same.

    weights: fp32 [n_blocks], as they are in the file. groups: uint32 [n_blocks], the same number for copies of each
    other. earlier: the samples of each Learn and Review before the phase, which have used up turns of the copies.
    clusters: uint32 [n_blocks], the same number for blocks of the same content; they count the same. chain: that of a
    Learn or Review; None for one by itself.
    """

    weights: npt.NDArray[np.float32] | None = None
    groups: npt.NDArray[np.uint32] | None = None
    earlier: tuple[int, ...] = ()
    clusters: npt.NDArray[np.uint32] | None = None
    chain: Chain | None = None

    def part(self, ranges: Sequence[tuple[int, int]], count: Callable[[int], int]) -> Counting:
        """Return the same for the blocks of some ranges, each from its first block to before its last. count: how many
        of a phase's samples are of these blocks."""
        weights = None if self.weights is None else join_ranges(self.weights, ranges)
        groups = None if self.groups is None else join_ranges(self.groups, ranges)
        clusters = None if self.clusters is None else join_ranges(self.clusters, ranges)
        chain = None if self.chain is None else self.chain.map(count)
        return Counting(weights, groups, tuple(map(count, self.earlier)), clusters, chain)


EQUAL = Counting()


def count_in(planned: PlannedPhase, segment: Segment, arrays: Arrays, declined: Collection[int]) -> Counting:
    """Return what makes the blocks of a segment count differently in one of its phases, given the arrays that its
    phases name. declined: the numbers of the Focus phases in whose place there was a Review."""
    phase = planned.phase
    weights = None if phase.weighted_by is None else arrays[phase.weighted_by].view(np.float32)
    groups = None if phase.copies == "all" else arrays[COPIES].view(np.uint32)
    earlier = [
        other.samples - other.phase.replayed(other.samples)
        for other in segment.phases
        if other.index < planned.index and other.phase.kind != "focus" and other.corpora == planned.corpora
    ]
    clusters = None if phase.clustered_by is None else arrays[phase.clustered_by].view(np.uint32)
    chain = None if phase.kind == "focus" else find_chain(planned, segment, declined)
    return Counting(weights, groups, tuple(earlier), clusters, chain)


def exact_sum(values: npt.NDArray[np.floating]) -> float:
    """Return the sum of values, each rounded to a multiple of 2^-16: the same on every machine."""
    total = 0
    for first in range(0, len(values), _CHUNK):
        part = values[first : first + _CHUNK].astype(np.float64)
        total += int(np.rint(part * _UNIT).astype(np.int64).sum())
    return total / _UNIT


def join_ranges(values: npt.NDArray[T], ranges: Sequence[tuple[int, int]]) -> npt.NDArray[T]:
    """Return the values of the blocks of some ranges; those of one range are not copied."""
    parts = [values[first:last] for first, last in ranges]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
