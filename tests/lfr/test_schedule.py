"""Schedules, plans and presets against hand-computed totals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lfr import _C
from megatron_lfr.lfr import PRESETS, Blend, FocusScope, Ledger, Phase, Plan, Schedule, preset
from megatron_lfr.lfr.journal import JournalFiles
from megatron_lfr.lfr.phase import CLUSTERS
from megatron_lfr.lfr.start import start_phase


def test_lfr_v1_is_four_epochs_as_the_paper_counts_them() -> None:
    plan = preset("lfr-v1").plan(1000, seq_length=8, global_batch_size=10)
    assert [p.samples for p in plan.phases] == [1000, 500, 1000, 5 * 300]
    assert [p.phase.kind for p in plan.phases] == ["learn", "focus", "review", "focus"]
    assert plan.total_samples == 4 * 1000
    assert plan.total_steps == 400


def test_lfr_ends_in_review_and_follows_the_budget() -> None:
    plan = preset("lfr").plan(1000, 8, 10, train_epochs=2.5)
    assert [p.phase.kind for p in plan.phases] == ["learn", "focus", "review", "focus", "review"]
    assert [p.samples for p in plan.phases] == [1000, 350, 500, 250, 400]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_spends_exactly_the_budget_it_is_given(name: str) -> None:
    schedule = preset(name)
    if not schedule.in_shares:
        assert schedule.plan(1000, 8, 10).total_samples == (3100 if name == "lfr-v1-2reps" else 4000)
        return
    assert schedule.plan(1000, 8, 10, train_iters=123).total_steps == 123
    assert schedule.plan(1000, 8, 10, train_samples=1234).total_samples == 1234
    assert schedule.plan(1000, 8, 10, train_epochs=2.0).total_samples == 2000


@given(
    shares=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    total=st.integers(8, 10_000),
    batch=st.integers(1, 64),
)
def test_shares_become_whole_steps_near_their_exact_length(shares: list[int], total: int, batch: int) -> None:
    phases = tuple(Phase("learn", share / sum(shares), "share") for share in shares)
    plan = Schedule(phases).plan(100, 8, batch, train_iters=total)
    assert plan.total_steps == total
    assert plan.total_samples == total * batch
    for planned in plan.phases:
        exact = planned.phase.duration * total
        assert planned.steps >= 1
        assert abs(planned.steps - exact) < 1 + sum(1 for share in shares if share / sum(shares) * total < 1)


def test_every_unit() -> None:
    phases = (
        Phase("learn", 0.25, "epochs"),
        Phase("focus", 2, "passes", drop=0.7),
        Phase("review", 7, "steps"),
        Phase("review", 100, "tokens"),
    )
    plan = Schedule(phases).plan(10, seq_length=8, global_batch_size=4)
    assert [p.samples for p in plan.phases] == [2, 18, 28, 13]  # 2 of 10 are scored, and 1 of these dropped
    assert [p.steps for p in plan.phases] == [1, 5, 7, 4]
    assert [p.first_step for p in plan.phases] == [0, 1, 6, 13]
    assert [plan.at_step(s).index for s in range(17)] == [0, *[1] * 5, *[2] * 7, *[3] * 4]
    with pytest.raises(ValueError, match="outside the plan's 17 steps"):
        plan.at_step(17)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give one of --train-iters, --train-samples, --train-epochs"),
        ({"train_iters": 5, "train_epochs": 1.0}, "not --train-iters and --train-epochs"),
        ({"train_iters": 2}, "--train-iters 2: too short for the schedule"),
    ],
)
def test_a_schedule_in_shares_needs_one_budget(budget: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("lfr").plan(1000, 8, 10, **budget)  # type: ignore[arg-type]


def test_a_budget_must_agree_with_absolute_lengths() -> None:
    schedule = preset("lfr-v1")
    assert schedule.plan(1000, 8, 10, train_iters=400).total_steps == 400
    with pytest.raises(ValueError, match="--train-iters 399: differs from the schedule's total of 400 steps"):
        schedule.plan(1000, 8, 10, train_iters=399)
    with pytest.raises(ValueError, match="--train-samples 1: differs from the schedule's total of 4000"):
        schedule.plan(1000, 8, 10, train_samples=1)
    with pytest.raises(ValueError, match="--train-epochs scales a schedule given in shares"):
        schedule.plan(1000, 8, 10, train_epochs=4.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "lern", "duration": 1}, "phase 0: phase kind 'lern': choose from learn, focus, review"),
        ({"kind": "learn", "duration": 0}, "must be a positive number of epochs"),
        ({"kind": "learn", "duration": float("nan")}, "must be a positive number"),
        ({"kind": "learn", "duration": 1.5, "unit": "steps"}, "must be a whole number of steps"),
        ({"kind": "focus", "duration": 1, "drop": 1.0}, "must be at least 0 and below 1"),
        ({"kind": "learn", "duration": 1, "drop": 0.5}, "only a focus phase drops blocks"),
        ({"kind": "learn"}, "phase 0: duration is missing"),
        ({"kind": "learn", "duration": 1, "lenght": 2}, "unknown key 'lenght'; legal keys: kind, duration"),
        ({"kind": "learn", "duration": "1"}, "phase 0: phase duration '1': must be a number"),
        ({"kind": "learn", "duration": True}, "phase duration True: must be a number"),
        ({"kind": "learn", "duration": 1, "drop": None}, "phase drop None: must be a number"),
        ({"kind": "learn", "duration": 1, "clusters": 8.0}, "phase clusters 8.0: must be a whole number"),
        ({"kind": "learn", "duration": 1, "clusters": 1}, "phase clusters 1: must lie between 2 and 63"),
        ({"kind": "learn", "duration": 1, "clusters": 64}, "phase clusters 64: must lie between 2 and 63"),
        ({"kind": ["learn"], "duration": 1}, "choose from learn, focus, review"),
        ({"kind": "focus", "duration": 1}, "phase 0: a schedule cannot begin with focus"),
        ({"kind": "learn", "duration": 0.5, "unit": "share"}, "must sum to 1, not 0.5"),
        ("learn", "expected a mapping"),
    ],
)
def test_bad_phases_are_named(row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_dicts([row])


def test_as_many_clusters_as_allowed_can_be_made() -> None:
    scores = np.arange(1000, dtype=np.float32)
    assert len(_C.cluster(scores, CLUSTERS[1])) == CLUSTERS[1] - 1
    with pytest.raises(ValueError, match="between 1 and 63"):
        _C.cluster(scores, CLUSTERS[1] + 1)


@pytest.mark.parametrize(
    ("phase", "budget", "message"),
    [
        (Phase("learn", 1e12), {}, "phase 0: duration 1e\\+12 epochs: 1e\\+15 blocks, more than 1099511627775"),
        (Phase("learn", 1e308), {}, "phase 0: duration 1e\\+308 epochs"),
        (Phase("learn", 10**12, "steps"), {}, "phase 0: duration 1e\\+12 steps"),
        (Phase("learn", 10**9, "steps"), {}, None),
        (Phase("learn", 3 * 10**9, "epochs"), {}, "phase 0: .*more than"),
        (Phase("learn", 1.0, "share"), {"train_epochs": float("nan")}, "--train-epochs nan: must be positive"),
        (Phase("learn", 1.0, "share"), {"train_epochs": 1e300}, "--train-epochs 1e\\+300: must be positive"),
        (Phase("learn", 1.0, "share"), {"train_iters": 2**37}, "phase 0: trains on 1374389534720 blocks"),
    ],
)
def test_lengths_that_could_not_be_made(phase: Phase, budget: dict[str, float], message: str | None) -> None:
    schedule = Schedule((phase,))
    if message is None:
        assert schedule.plan(1000, 8, 10, **budget).total_steps == 10**9  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=message):
        schedule.plan(1000, 8, 10, **budget)  # type: ignore[arg-type]


LFR = preset("lfr").phases

CONTROLS: dict[str, tuple[str, tuple[Phase, ...]]] = {
    "random-focus": ("score", tuple(replace(p, score="shuffled") if p.kind == "focus" else p for p in LFR)),
    "static": ("duration", (LFR[0], replace(LFR[1], duration=0.6))),
    "learn-only": (
        "kind",
        (LFR[0], *(Phase("learn", p.duration, "share", passes="continued") for p in LFR[1:])),
    ),
    "focus-only": (
        "kind",
        tuple(replace(LFR[k - 1], duration=p.duration) if p.kind == "review" else p for k, p in enumerate(LFR)),
    ),
}
"""The one field in which each control differs from `lfr`, and the phases that result."""


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_differs_from_lfr_in_one_thing(name: str) -> None:
    field, expected = CONTROLS[name]
    phases = preset(name).phases
    assert phases == expected
    for mine, lfr in zip(phases, LFR, strict=False):  # static has fewer
        differing = {name for name, value in vars(mine).items() if value != getattr(lfr, name)}
        if "kind" in differing:  # what else a Focus has follows from the one before it
            assert (field, mine.duration) == ("kind", lfr.duration)
        else:
            assert differing <= {field}


def kept_of(schedule: Schedule, n_blocks: int, batch: int = 4, blend: Blend | None = None) -> list[int]:
    return [planned.samples for planned in schedule.plan(n_blocks, 8, batch, blend=blend).phases]


def passes(drop: float, **more: object) -> Phase:
    return Phase("focus", 1, "passes", drop=drop, **more)  # type: ignore[arg-type]


def test_a_pass_is_over_what_is_kept() -> None:
    excluding = {"unseen": "exclude"}
    clusters = {"selection": "clusters", "sampling": "visits"}
    for phases, expected in (
        ((Phase("learn", 0.1), passes(0.5, **excluding)), [100, 50]),
        ((Phase("learn", 0.1), passes(0.5, **clusters)), [100, 50]),
        ((Phase("learn", 0.1), passes(0.5)), [100, 950]),
        ((Phase("learn", 3, "steps"), passes(0.5, **excluding), passes(0.7, **excluding)), [12, 6, 4]),
        ((Phase("learn", 1), passes(0.5), Phase("review", 0.2), passes(0.7, **excluding)), [1000, 500, 200, 300]),
        ((Phase("learn", 0.1), passes(0.5), passes(0.7, **excluding)), [100, 950, 300]),  # the pass saw all unseen
        ((Phase("learn", 0.1), passes(0.5, score="rescored", **excluding)), [100, 500]),
        ((Phase("learn", 0.2), Phase("review", 0.2), passes(0.5)), [200, 200, 800]),  # 400 scored at most
    ):
        assert kept_of(Schedule(phases), 1000) == expected


@pytest.mark.parametrize(
    "phases",
    [
        (Phase("learn", 0.2), Phase("review", 0.2)),
        (Phase("learn", 0.2), Phase("focus", 0.1, drop=0.5)),
        (Phase("learn", 0.2), Phase("focus", 3, drop=0.5, sampling="visits")),
    ],
)
def test_a_pass_of_unknown_length_is_refused(phases: tuple[Phase, ...]) -> None:
    for more in ({"unseen": "exclude"}, {"selection": "clusters"}):
        message = (
            "phase 2: unit passes, unseen (exclude|auto): .* 200 to .* of 1000. Give the duration in epochs or steps"
        )
        with pytest.raises(ValueError, match=message):
            Schedule((*phases, passes(0.5, **more))).plan(1000, 8, 4)
        Schedule((*phases, passes(0.5, unseen="keep"))).plan(1000, 8, 4)


def test_a_pass_after_a_blend_counts_each_corpus() -> None:
    blend = Blend([0, 100, 1000], [3.0, 1.0])
    schedule = Schedule((Phase("learn", 0.2), passes(0.5, unseen="exclude")))
    assert kept_of(schedule, 1000, blend=blend) == [200, (100 + 50) // 2]  # 150 samples from the 100 of the first
    again = Schedule((Phase("learn", 0.2), Phase("review", 0.2), passes(0.5, unseen="exclude")))
    with pytest.raises(ValueError, match=r"phase 2: .* 150 to \d+ of 1000"):
        again.plan(1000, 8, 4, blend=blend)


def test_a_focus_on_all_corpora_together_drops_a_share_of_all() -> None:
    blend = Blend([0, 5, 30], [2.0, 1.0])
    schedule = Schedule((Phase("learn", 3.0), passes(0.3)))
    assert kept_of(schedule, 30, blend=blend) == [90, 21]  # 30 - floor(0.3 * 30), not 30 - floor(1.5) - floor(7.5)


any_phase = st.builds(
    dict,
    kind=st.sampled_from(["learn", "focus", "focus", "review"]),
    duration=st.sampled_from([0.1, 0.3, 0.5, 1, 1.7, 3]),
    unit=st.sampled_from(["epochs", "passes", "steps", "tokens"]),
    drop=st.sampled_from([0.0, 0.3, 0.5, 0.99]),
    selection=st.sampled_from(["threshold", "clusters"]),
    sampling=st.sampled_from(["passes", "visits", "choice"]),
    score=st.sampled_from(["recorded", "detrended", "rescored", "shuffled", "improvement"]),
    unseen=st.sampled_from(["auto", "keep", "exclude"]),
    clusters=st.sampled_from([2, 8, 63]),
)


@settings(max_examples=150)
@given(
    rows=st.lists(any_phase, min_size=1, max_size=5),
    starts=st.sampled_from([[0, 1], [0, 2, 3], [0, 5, 30], [0, 40, 41, 60]]),
    weighted=st.booleans(),
    scope=st.sampled_from(["global", "per-corpus"]),
    batch=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 1e4, 1e36]),
    seed=st.integers(0, 2**32),
)
def test_what_can_be_planned_can_be_made(
    rows: list[dict[str, Any]], starts: list[int], weighted: bool, scope: str, batch: int, scale: float, seed: int
) -> None:
    """Every boundary of a schedule that passes at start has an order, and a pass repeats no block that it keeps."""
    rng = np.random.default_rng(seed)
    n = starts[-1]
    blend = Blend(starts, rng.uniform(0.1, 3, len(starts) - 1).tolist() if weighted else None, scope)  # type: ignore[arg-type]
    rows[0] |= {"kind": "learn"} if rows[0]["score"] != "rescored" else {}
    for row in rows:
        row["drop"] *= row["kind"] == "focus"
    try:
        plan = Schedule.from_dicts(rows).plan(n, 2, batch, blend=blend)
    except ValueError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert re.match(r"phase \d: ", reason)
        return
    ledger = Ledger.of(plan)
    with TemporaryDirectory() as folder:
        for planned in plan.phases:
            if planned.phase.is_rescored:
                np.save(JournalFiles(Path(folder)).scores_path(planned.index), rng.gamma(2, 1, n).astype(np.float32))
            started = start_phase(plan, planned, ledger, seed, JournalFiles(Path(folder)))
            order, selection = started.order, started.selection
            assert len(order) == planned.samples
            assert order.max() < n
            if selection is not None and planned.phase.unit == "passes" and scope == "global":
                kept = n - int(selection.left_out(started.scores).sum())
                if planned.phase.selection == "threshold" and planned.phase.sampling == "passes":
                    assert planned.samples <= max(1, round(planned.phase.duration * kept))
            nll = (rng.gamma(2, 1, planned.samples) * scale).astype(np.float32)
            ledger.record_phase(planned.first_step, batch, order, nll)


IMPROVEMENT = Phase("focus", 0.5, drop=0.5, score="improvement")


@pytest.mark.parametrize(
    ("before", "more", "visits"),
    [
        ((Phase("learn", 1),), {}, 100),
        ((Phase("learn", 0.5), Phase("review", 0.5)), {}, 100),
        ((Phase("learn", 2, scope=("a",)),), {"scope": ("b",)}, 0),
        ((Phase("learn", 1.9),), {"scope": ("b",)}, 60),
        ((Phase("learn", 1, scope=("a",), replay=0.5),), {"scope": ("b",)}, 20),
        ((Phase("learn", 1), Phase("focus", 0.5, drop=0.5)), {"scope": ("a",)}, 40),
    ],
)
def test_improvement_needs_blocks_that_are_certain_to_come_twice(
    before: tuple[Phase, ...], more: dict[str, Any], visits: int
) -> None:
    schedule = Schedule((*before, replace(IMPROVEMENT, **more)))
    with pytest.raises(ValueError, match=rf"phase {len(before)}: score improvement .* {visits} times at least"):
        schedule.plan(100, 4, 8, blend=Blend([0, 40, 100]), names=["a", "b"])


SCOPED = Phase("focus", 4, "steps", drop=0.5, scope=("b",))


@pytest.mark.parametrize(
    ("before", "focus", "scope", "is_refused"),
    [
        (Phase("learn", 4, "steps", scope=("a",)), SCOPED, "global", True),
        (Phase("learn", 4, "steps", scope=("a",)), replace(SCOPED, unit="share", duration=0.5), "global", True),
        (Phase("learn", 4, "steps", scope=("a",), replay=0.5), SCOPED, "global", False),
        (Phase("learn", 4, "steps"), SCOPED, "global", False),
        (Phase("learn", 4, "steps", scope=("a",)), replace(SCOPED, score="rescored"), "global", False),
        (Phase("learn", 4, "steps", scope=("a",)), replace(SCOPED, score="call:numpy:isnan"), "global", False),
        (Phase("learn", 4, "steps", scope=("a",)), replace(SCOPED, least_scored=0.5), "global", False),
        (Phase("learn", 4, "steps", scope=("a",)), SCOPED, "per-corpus", False),
    ],
)
def test_a_focus_needs_blocks_that_came_before_it(
    before: Phase, focus: Phase, scope: FocusScope, is_refused: bool
) -> None:
    blend = Blend([0, 50, 100], None, scope)
    budget = {"train_iters": 8} if focus.unit == "share" else {}
    if budget:
        before = replace(before, duration=0.5, unit="share")

    def plan() -> Plan:
        return Schedule((before, focus)).plan(100, 8, 4, blend=blend, names=["a", "b"], **budget)

    if is_refused:
        with pytest.raises(ValueError, match="phase 1: no block in its scope has a score yet"):
            plan()
    else:
        plan()
    assert focus.may_fail


def test_a_focus_by_a_function_may_be_the_first_on_its_blocks() -> None:
    blend = Blend([0, 50, 100])
    called = replace(SCOPED, score="call:numpy:isnan", unseen="exclude")
    phases = (Phase("learn", 4, "steps", scope=("a",)), called, SCOPED)
    plan = Schedule(phases).plan(100, 8, 4, blend=blend, names=["a", "b"])
    assert [planned.corpora for planned in plan.phases] == [(0,), (1,), (1,)]


def test_a_pass_after_a_function_is_of_unknown_length() -> None:
    """Which corpora the function gives scores, and which are sampled uniformly, is not known before the run."""
    blend = Blend([0, 100, 200], [1, 1], "per-corpus")
    called = Phase("focus", 20, "steps", drop=0.5, score="call:numpy:isnan", unseen="exclude")
    phases = (Phase("learn", 0.5), called, Phase("focus", 1, "passes", drop=0.5, unseen="exclude"))
    with pytest.raises(ValueError, match=r"phase 2: .*is not known before the run: 100 to 180 of 200"):
        Schedule(phases).plan(200, 8, 4, blend=blend)
    with pytest.raises(ValueError, match=r"phase 2: .*is not known before the run: 100 to 180 of 200"):
        Schedule(phases).plan(200, 8, 4, blend=Blend([0, 200]))


@pytest.mark.parametrize("score", ["rescored", "file:outside", "call:numpy:isnan"])
@pytest.mark.parametrize("more", [{"drop": 0.5}, {"drop_hardest": 0.5}])
def test_what_a_focus_drops_by_scores_from_outside_may_have_none_of_the_run(score: str, more: dict[str, float]) -> None:
    """Such a Focus may leave out blocks that were never trained on, however long it is."""
    learn = Phase("learn", 0.25)
    focus = Phase("focus", 3, score=score, unseen="keep", **more)
    pass_ = Phase("focus", 1, "passes", drop=0.5, unseen="exclude")
    with pytest.raises(ValueError, match=r"phase 2: .*is not known before the run: 50 to 200 of 200"):
        Schedule((learn, focus, pass_)).plan(200, 8, 4)
    complete = replace(focus, drop=0.0, drop_hardest=0.0)
    assert Schedule((learn, complete, pass_)).plan(200, 8, 4).phases[2].samples == 100


@pytest.mark.parametrize(
    ("before", "more", "blend"),
    [
        ((Phase("learn", 1.01),), {}, Blend([0, 40, 100])),
        ((Phase("learn", 0.6), Phase("review", 0.5)), {}, Blend([0, 40, 100])),
        ((Phase("learn", 1.1, scope=("b",)),), {"scope": ("b",)}, Blend([0, 40, 100])),
        ((Phase("learn", 2),), {"scope": ("b",)}, Blend([0, 40, 100])),
        ((Phase("learn", 1),), {"scope": ("a",)}, Blend([0, 40, 100], [0.5, 0.5])),
        ((Phase("learn", 0.5),), {}, Blend([0, 40, 100], focus_scope="per-corpus")),
    ],
)
def test_improvement_is_planned_where_blocks_come_twice(
    before: tuple[Phase, ...], more: dict[str, Any], blend: Blend
) -> None:
    plan = Schedule((*before, replace(IMPROVEMENT, **more))).plan(100, 4, 8, blend=blend, names=["a", "b"])
    ledger, journal = Ledger.of(plan), JournalFiles(Path("/nowhere"))
    for planned in plan.phases:
        order = start_phase(plan, planned, ledger, 1, journal).order
        ledger.record_phase(planned.first_step, 8, order, np.arange(len(order), dtype=np.float32) % 7)
    assert len(order) == plan.phases[-1].samples


def test_schedules_survive_a_round_trip_through_dicts() -> None:
    for _, schedule in PRESETS.values():
        assert Schedule.from_dicts(schedule.to_dicts()) == schedule


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="unknown LFR preset 'lfr-v9': choose from lfr, lfr-v1"):
        preset("lfr-v9")
