"""The start of a phase: its scores from the ledger, and its order from these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_lfr import _C
from megatron_lfr.lfr.guard import Verdict, as_review, judge_scores, judge_worth, kind_of
from megatron_lfr.lfr.journal import JournalFiles
from megatron_lfr.lfr.ledger import Ledger, of_unit_spread
from megatron_lfr.lfr.left_out import Scores
from megatron_lfr.lfr.plan import AnySelection, Plan, PlannedPhase
from megatron_lfr.lfr.rescoring import read_scores
from megatron_lfr.lfr.scores import NO_ARRAYS, Arrays
from megatron_lfr.lfr.selection import Order, phase_seed


@dataclass(frozen=True)
class PhaseStart:
    """What was decided at a phase's boundary."""

    planned: PlannedPhase
    order: Order
    """Block ids [planned.samples], in the order of training."""
    scores: Scores
    """The scores that the order was made from: fp32 [n_blocks], higher is harder, NaN where a block has none. Empty on
    a follower."""
    selection: AnySelection | None
    """What the phase leaves out; None unless a Focus takes place, and on a follower."""
    verdict: Verdict | None
    """Whether a Focus that may be declined takes place, or a Review instead; None for others, and on a follower."""

    @property
    def kind(self) -> str:
        """What the phase trains as; on a follower, what the schedule says."""
        return kind_of(self.planned.phase, self.verdict)

    @cached_property
    def order_hash(self) -> int:
        """A hash of 64 bits of the order."""
        return _C.order_hash(self.order)


def start_phase(
    plan: Plan, planned: PlannedPhase, ledger: Ledger, seed: int, journal: JournalFiles, arrays: Arrays = NO_ARRAYS
) -> PhaseStart:
    """Begin a phase in `ledger`, in which all steps before it are recorded, and make its order. arrays: those of the
    phase's segment."""
    scores, prior = _scores(planned, ledger, seed, journal, arrays)
    if planned.phase.may_be_declined:
        order, selection, verdict = _focus_or_review(plan, planned, scores, ledger, seed, arrays)
    else:
        order, selection = plan.make_order(planned, scores, seed, arrays, ledger.declined)
        verdict = None
    ledger.begin_phase(planned.first_step, selection is not None, prior, planned.segment)
    return PhaseStart(planned, order, scores, selection, verdict)


def _focus_or_review(
    plan: Plan, planned: PlannedPhase, scores: Scores, ledger: Ledger, seed: int, arrays: Arrays
) -> tuple[Order, AnySelection | None, Verdict]:
    """Make the order of a Focus that may be declined: the Review's, where it is."""
    phase = planned.phase
    in_its_place = replace(planned, phase=as_review(phase))
    review, _ = plan.make_order(in_its_place, scores, seed, arrays, ledger.declined)
    verdict = judge_scores(phase, review, scores)
    if verdict.accepted:
        focus, selection = plan.make_order(planned, scores, seed, arrays, ledger.declined)
        if phase.guarded_by is not None:
            verdict = judge_worth(phase, focus, review, arrays)
        if verdict.accepted:
            return focus, selection, verdict
    ledger.declined.add(planned.index)
    return review, None, verdict


def _scores(
    planned: PlannedPhase, ledger: Ledger, seed: int, journal: JournalFiles, arrays: Arrays
) -> tuple[Scores, Scores | None]:
    """Return the scores [n_blocks] of a phase, and those that its losses are measured against, if they are others."""
    phase = planned.phase
    match phase.score_mode if phase.kind == "focus" else "recorded":
        case "detrended":
            return ledger.detrended_scores(), None
        case "shuffled":
            return ledger.shuffled_scores(phase_seed(seed, -1 - planned.index)), None
        case "improvement":
            scores = ledger.improvement_scores()
            return scores, of_unit_spread(
                -scores
            )  # losses rise with a prior, and those that have just fallen are lower
        case "rescored" | "call" as mode:
            scores = ledger.of_all(read_scores(journal, planned.index, ledger.n_blocks(planned.segment)))
            return scores, of_unit_spread(scores) if mode == "call" else scores
        case "file" | "excess" as mode:
            assert phase.scored_by is not None
            array = ledger.of_all(arrays[phase.scored_by].view(np.float32))
            scores = array if mode == "file" else ledger.detrended_scores() - array
            return scores, of_unit_spread(scores)
        case _:
            return ledger.recorded_scores(), None
