"""Whether a Focus takes place, against plain means over the samples of it and of a Review."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr.lfr import Blend, Ledger, Phase, Plan, Schedule
from megatron_lfr.lfr.journal import UNRECORDED, JournalFiles
from megatron_lfr.lfr.start import PhaseStart, start_phase

BLOCKS = 600
GUARDED = Phase("focus", 0.5, drop=0.4, guard="file:worth")
NO_JOURNAL = JournalFiles(Path("/nowhere"))
Floats = npt.NDArray[np.float32]


def start_focus(plan: Plan, losses: Floats, arrays: dict[str, Floats], seed: int = 1) -> tuple[PhaseStart, Ledger]:
    """Learn one epoch, in which block b has the loss `losses[b]`, and start the phase after it."""
    ledger, learn = Ledger.of(plan), plan.phases[0]
    order = start_phase(plan, learn, ledger, seed, NO_JOURNAL, arrays).order
    ledger.record_phase(0, learn.global_batch_size, order, losses[order])
    return start_phase(plan, plan.phases[1], ledger, seed, NO_JOURNAL, arrays), ledger


@pytest.mark.parametrize("weight", ["none", "file:worth"])
@pytest.mark.parametrize("blend", [Blend([0, BLOCKS]), Blend([0, 200, BLOCKS], [0.5, 0.5], "per-corpus")], ids=repr)
@pytest.mark.parametrize("link", [-1.0, -0.1, 0.1, 1.0])
def test_a_focus_is_trained_where_its_blocks_are_worth_more(link: float, blend: Blend, weight: str) -> None:
    """Hard blocks are worth more, or less; without a guard, the Focus is the same, and a Learn is the Review."""
    rng = np.random.default_rng(1)
    losses = rng.gamma(4, 1, BLOCKS).astype(np.float32)
    standing = (losses - losses.mean()) / losses.std()
    worth = np.clip(0.5 + 0.2 * (link * standing + 0.3 * rng.normal(size=BLOCKS)), 0.01, 1).astype(np.float32)
    orders = {}
    for name, phase in {
        "guarded": GUARDED,
        "focus": replace(GUARDED, guard="none"),
        "learn": Phase("learn", 0.5),
    }.items():
        schedule = Schedule((Phase("learn", 1), replace(phase, weight=weight)))
        plan = schedule.plan(BLOCKS, 8, 8, blend=blend)
        orders[name], ledger = start_focus(plan, losses, {"worth": worth})
        ledger.record_phase(plan.phases[1].first_step, 8, orders[name].order, losses[orders[name].order])
        orders[name + " later"] = ledger.detrended_scores()
    guarded, verdict = orders["guarded"], orders["guarded"].verdict
    gain = worth[orders["focus"].order].mean(dtype=np.float64) / worth[orders["learn"].order].mean(dtype=np.float64)
    assert verdict.value == pytest.approx(gain, rel=1e-4)
    assert verdict.accepted == (gain >= 1.05) == (guarded.selection is not None)
    taken = "focus" if verdict.accepted else "learn"
    np.testing.assert_array_equal(guarded.order, orders[taken].order)
    np.testing.assert_array_equal(orders["guarded later"], orders[f"{taken} later"])  # measured as what it was


def test_both_decisions_occur() -> None:
    losses = np.arange(1, BLOCKS + 1, dtype=np.float32) / 100
    plan = Schedule((Phase("learn", 1), GUARDED)).plan(BLOCKS, 8, 8)
    rising, equal = losses / losses.max(), np.ones(BLOCKS, np.float32)
    assert start_focus(plan, losses, {"worth": rising})[0].verdict.accepted
    for worth in (equal, rising[::-1].copy()):
        assert not start_focus(plan, losses, {"worth": worth})[0].verdict.accepted
    lax = Schedule((Phase("learn", 1), replace(GUARDED, guard_gain=0.0))).plan(BLOCKS, 8, 8)
    assert start_focus(lax, losses, {"worth": equal})[0].verdict.accepted


def test_a_guarded_focus_samples_a_corpus_without_a_score_at_random() -> None:
    plan = Schedule((Phase("learn", 1, scope=("a",)), replace(GUARDED, guard_gain=0.0))).plan(
        BLOCKS, 8, 8, blend=Blend([0, 200, BLOCKS], focus_scope="per-corpus"), names=["a", "b"]
    )
    losses = np.arange(1, BLOCKS + 1, dtype=np.float32) / 100
    started, _ = start_focus(plan, losses, {"worth": losses})
    assert started.verdict.accepted
    drawn = started.order[started.order >= 200]
    assert len(set(drawn)) == len(drawn) == 200  # half of the epoch, by the corpora's sizes


@pytest.mark.parametrize("unseen", ["keep", "exclude"])
def test_what_a_guarded_focus_leaves_unseen_is_not_certain(unseen: Any) -> None:
    """Whether it is a Focus or a Review is decided later, so a pass over what was seen then has no length."""
    later = Phase("focus", 1, "passes", drop=0.5, unseen="exclude")
    with pytest.raises(ValueError, match="phase 2: unit passes"):
        Schedule((Phase("learn", 0.5), replace(GUARDED, duration=1.0, unseen=unseen), later)).plan(BLOCKS, 8, 8)
    Schedule((Phase("learn", 1), GUARDED, later)).plan(BLOCKS, 8, 8)


@pytest.mark.parametrize("weight", ["none", "file:worth"])
@pytest.mark.parametrize("blend", [Blend([0, BLOCKS]), Blend([0, 200, BLOCKS], [0.9, 0.1])], ids=repr)
@pytest.mark.parametrize("learned", [0.3, 0.8, 0.95, 1.0, 1.6])
def test_a_focus_waits_until_a_review_meets_few_blocks_without_a_score(
    learned: float, blend: Blend, weight: Any
) -> None:
    by_weight: dict[str, Any] = {"weight": weight, "passes": "continued"}
    losses = np.random.default_rng(1).gamma(4, 1, BLOCKS).astype(np.float32)
    worth = np.linspace(0.1, 1, BLOCKS, dtype=np.float32)
    orders, ledgers = {}, {}
    for name, phase in {
        "waiting": Phase("focus", 0.2, drop=0.5, least_scored=0.5, **by_weight),
        "focus": Phase("focus", 0.2, drop=0.5, weight=weight),
        "review": Phase("review", 0.2, **by_weight),
    }.items():
        plan = Schedule((Phase("learn", learned, **by_weight), phase)).plan(BLOCKS, 8, 8, blend=blend)
        orders[name], ledgers[name] = start_focus(plan, losses, {"worth": worth})
    verdict = orders["waiting"].verdict
    assert verdict is not None
    assert verdict.value == np.isfinite(ledgers["waiting"].nll[orders["review"].order]).mean()
    assert verdict.accepted == (verdict.value >= 0.5) == (orders["waiting"].selection is not None)
    taken = "focus" if verdict.accepted else "review"
    np.testing.assert_array_equal(orders["waiting"].order, orders[taken].order)
    if weight == "none" and blend.weights is None:  # 480 of 600 samples of a Review in the first pass
        assert verdict.accepted == (learned >= 0.95)


def test_a_focus_without_any_score_waits_and_one_by_an_array_does_not() -> None:
    none, scores = np.full(BLOCKS, UNRECORDED, np.float32), {"worth": np.arange(BLOCKS, dtype=np.float32)}
    for score, accepted in (("detrended", False), ("improvement", False), ("file:worth", True)):
        focus = Phase("focus", 0.5, drop=0.5, score=score, least_scored=1.0)
        learn = Phase("learn", 2 if score == "improvement" else 1)
        plan = Schedule((learn, focus)).plan(BLOCKS, 8, 8)
        verdict = start_focus(plan, none, scores)[0].verdict
        assert verdict is not None
        assert verdict.accepted == accepted


def test_the_guard_is_asked_only_where_enough_blocks_have_a_score() -> None:
    losses = np.arange(1, BLOCKS + 1, dtype=np.float32) / 100
    for learned, of in ((0.4, "scored"), (1.0, "gain")):
        focus = replace(GUARDED, least_scored=0.5, passes="continued")
        started, _ = start_focus(
            Schedule((Phase("learn", learned), focus)).plan(BLOCKS, 8, 8), losses, {"worth": losses}
        )
        assert started.verdict is not None
        assert started.verdict.of == of
        assert started.verdict.accepted == (of == "gain")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "learn", "guard": "file:worth"}, "only a focus phase has one"),
        ({"kind": "focus", "guard": "worth"}, "phase guard 'worth': choose from none, file:NAME"),
        ({"kind": "review", "least_scored": 0.5}, "phase least_scored 0.5: only a focus phase has it"),
        ({"kind": "focus", "least_scored": 1.5}, "phase least_scored 1.5: must be at least 0 and at most 1"),
        ({"kind": "focus", "least_scored": "all"}, "phase least_scored 'all': must be a number"),
        ({"kind": "focus", "guard_gain": -0.1}, "phase guard_gain -0.1: must be at least 0"),
        ({"kind": "focus", "guard_gain": True}, "phase guard_gain True: must be a number"),
    ],
)
def test_illegal_guards_are_refused(row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_dicts([{"kind": "learn", "duration": 1}, {"duration": 1, **row}])
