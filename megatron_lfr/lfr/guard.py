"""Whether a Focus takes place, or a Review of as many samples instead (ours). A phase may set two conditions.

`least_scored`: how many blocks have a score. Before the end of the first pass, a Focus repeats blocks in the place of
new ones, of which no loss is known yet.

`guard`: what the blocks are worth, by an array from outside of the run, as `megatron-lfr commonness` makes one: 1 where
nothing of a block is copied, 0 where all of it is junk. A Focus ranks blocks by losses, which rise with noise as they
do with what is yet to be learned; the array tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_lfr.lfr.left_out import Scores
from megatron_lfr.lfr.phase import Kind, Phase
from megatron_lfr.lfr.scores import Arrays
from megatron_lfr.lfr.selection import Order
from megatron_lfr.lfr.weights import NO_WEIGHT, exact_sum

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Verdict:
    """What decided whether a Focus takes place: `value` must be at least `least`.

    of: scored, the share of the Review's samples that are blocks with a score; or gain, how many times as much as the
    Review's the samples of the Focus are worth.
    """

    of: Literal["scored", "gain"]
    value: float
    least: float

    @property
    def accepted(self) -> bool:
        """Whether the Focus is trained, and not a Review in its place."""
        return self.value >= self.least

    def as_dict(self) -> dict[str, float | bool]:
        """Return what metrics.jsonl and a study's results say of it."""
        return {"accepted": self.accepted, self.of: self.value}

    def __str__(self) -> str:
        decision = "focus" if self.accepted else "review instead"
        if self.of == "gain":
            return (
                f"{decision}, its blocks are worth {self.value:.3f} times those of a review (at least {self.least:g})"
            )
        return f"{decision}, {self.value:.1%} of a review's blocks have a score (at least {self.least:.0%})"


def as_review(phase: Phase) -> Phase:
    """Return the Review that takes the place of a Focus that is declined, or that has no score to go by."""
    return replace(phase, kind="review", drop=0.0, drop_hardest=0.0, explore=0.0, guard=NO_WEIGHT, least_scored=0.0)


def kind_of(phase: Phase, verdict: Verdict | None) -> Kind:
    """Return what a phase trains as: a Focus that is declined is a Review."""
    return "review" if verdict is not None and not verdict.accepted else phase.kind


def judge_scores(phase: Phase, review: Order, scores: Scores) -> Verdict:
    """Decide by how many samples [samples] of the Review in the place of a Focus have a score [n_blocks]."""
    scored = _mean(lambda ids: int((~np.isnan(scores[ids])).sum()), review)
    return Verdict("scored", scored, phase.least_scored)


def judge_worth(phase: Phase, focus: Order, review: Order, arrays: Arrays) -> Verdict:
    """Decide by what the samples of a Focus and of the Review in its place are worth, ids [samples] each. Where a
    Review's are worth 0, both are worth the same."""
    assert phase.guarded_by is not None
    worths = arrays[phase.guarded_by].view(np.float32)
    worth, at_random = (_mean(lambda ids: exact_sum(worths[ids]), order) for order in (focus, review))
    return Verdict("gain", worth / at_random if at_random else 1.0, 1.0 + phase.guard_gain)


def _mean(total: Callable[[Order], float], order: Order) -> float:
    """Return the mean over an order, given the total of a part of it."""
    return sum(total(order[first : first + _CHUNK]) for first in range(0, len(order), _CHUNK)) / len(order)
