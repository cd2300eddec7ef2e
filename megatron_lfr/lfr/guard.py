"""The guard of a Focus: whether the blocks that it would train on are worth more than those of a Review (ours).

What blocks are worth is an array from outside of the run, as `megatron-lfr commonness` makes one: 1 where nothing of
a block is copied, 0 where all of it is junk. A Focus ranks blocks by losses, which rise with noise as they do with what
is yet to be learned; the array tells the two apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_lfr.lfr.left_out import Scores
from megatron_lfr.lfr.phase import Phase
from megatron_lfr.lfr.scores import Arrays
from megatron_lfr.lfr.selection import Order
from megatron_lfr.lfr.weights import NO_WEIGHT, exact_sum

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Verdict:
    """What the guard of a Focus finds at its start.

    worth: mean of the array over the samples of the Focus; at_random: over those of a Review of the same length; least:
    what worth / at_random must reach at least for the Focus to be trained.
    """

    worth: float
    at_random: float
    least: float

    @property
    def gain(self) -> float:
        """How many times as much as a Review's the samples of the Focus are worth; 1 where a Review's are worth 0."""
        return self.worth / self.at_random if self.at_random else 1.0

    @property
    def accepted(self) -> bool:
        """Whether the Focus is trained, and not a Review in its place."""
        return self.gain >= self.least

    def as_dict(self) -> dict[str, float | bool]:
        """Return what metrics.jsonl and a study's results say of it."""
        return {"accepted": self.accepted, "gain": self.gain}

    def __str__(self) -> str:
        decision = "focus" if self.accepted else "review instead"
        return f"{decision}, its blocks are worth {self.gain:.3f} times those of a review (at least {self.least:g})"


def as_review(phase: Phase) -> Phase:
    """Return the Review that takes the place of a Focus whose guard declines."""
    return replace(phase, kind="review", drop=0.0, drop_hardest=0.0, explore=0.0, guard=NO_WEIGHT)


def judge(phase: Phase, focus: Order, review: Order, arrays: Arrays) -> Verdict:
    """Compare the orders of a guarded Focus and of the Review in its place, ids [samples] each."""
    assert phase.guarded_by is not None
    worths = arrays[phase.guarded_by].view(np.float32)
    return Verdict(_mean(worths, focus), _mean(worths, review), 1.0 + phase.guard_gain)


def _mean(worths: Scores, order: Order) -> float:
    parts = (worths[order[first : first + _CHUNK]] for first in range(0, len(order), _CHUNK))
    return sum(map(exact_sum, parts)) / len(order)
