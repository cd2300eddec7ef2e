"""Schedules, plans and presets against hand-computed totals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.lfr import PRESETS, Phase, Schedule, preset


def test_lfr_v1_is_four_epochs_as_the_paper_counts_them() -> None:
    plan = preset("lfr-v1").plan(1000, seq_length=8, global_batch_size=10)
    assert [p.draws for p in plan.phases] == [1000, 500, 1000, 5 * 300]
    assert [p.phase.kind for p in plan.phases] == ["learn", "focus", "review", "focus"]
    assert plan.total_draws == 4 * 1000
    assert plan.total_steps == 400


def test_lfr_ends_in_review_and_follows_the_budget() -> None:
    plan = preset("lfr").plan(1000, 8, 10, train_epochs=2.5)
    assert [p.phase.kind for p in plan.phases] == ["learn", "focus", "review", "focus", "review"]
    assert [p.draws for p in plan.phases] == [1000, 350, 500, 250, 400]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_spends_exactly_the_budget_it_is_given(name: str) -> None:
    schedule = preset(name)
    if not schedule.in_shares:
        assert schedule.plan(1000, 8, 10).total_draws == 4000
        return
    assert schedule.plan(1000, 8, 10, train_iters=123).total_steps == 123
    assert schedule.plan(1000, 8, 10, train_samples=1234).total_draws == 1234
    assert schedule.plan(1000, 8, 10, train_epochs=2.0).total_draws == 2000


@given(
    shares=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    total=st.integers(8, 10_000),
    batch=st.integers(1, 64),
)
def test_shares_become_whole_steps_near_their_exact_length(shares: list[int], total: int, batch: int) -> None:
    phases = tuple(Phase("learn", share / sum(shares), "share") for share in shares)
    plan = Schedule(phases).plan(100, 8, batch, train_iters=total)
    assert plan.total_steps == total
    assert plan.total_draws == total * batch
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
    assert [p.draws for p in plan.phases] == [2, 6, 28, 13]
    assert [p.steps for p in plan.phases] == [1, 2, 7, 4]
    assert [p.first_step for p in plan.phases] == [0, 1, 3, 10]
    assert [plan.at_step(s).index for s in range(14)] == [0, 1, 1, *[2] * 7, *[3] * 4]
    with pytest.raises(ValueError, match="outside the plan's 14 steps"):
        plan.at_step(14)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give one of --train-iters, --train-samples, --train-epochs"),
        ({"train_iters": 5, "train_epochs": 1.0}, "not --train-iters and --train-epochs"),
        ({"train_iters": 2}, "too short"),
    ],
)
def test_a_schedule_in_shares_needs_one_budget(budget: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("lfr").plan(1000, 8, 10, **budget)  # type: ignore[arg-type]


def test_a_budget_must_agree_with_absolute_lengths() -> None:
    schedule = preset("lfr-v1")
    assert schedule.plan(1000, 8, 10, train_iters=400).total_steps == 400
    with pytest.raises(ValueError, match="--train-iters 399 against the schedule's total of 400 steps"):
        schedule.plan(1000, 8, 10, train_iters=399)
    with pytest.raises(ValueError, match="--train-samples 1 against the schedule's total of 4000"):
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
        ({"kind": "learn", "duration": 1, "lenght": 2}, "unknown key 'lenght'; legal keys: kind, duration"),
        ({"kind": "learn"}, "duration"),
        ({"kind": "focus", "duration": 1}, "cannot begin with focus"),
        ({"kind": "learn", "duration": 0.5, "unit": "share"}, "must sum to 1, not 0.5"),
        ("learn", "expected a mapping"),
    ],
)
def test_bad_phases_are_named(row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_dicts([row])


def test_schedules_survive_a_round_trip_through_dicts() -> None:
    for _, schedule in PRESETS.values():
        assert Schedule.from_dicts(schedule.to_dicts()) == schedule


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="unknown LFR preset 'lfr-v9': choose from lfr, lfr-v1"):
        preset("lfr-v9")
