"""Learn and Review phases that go on with each other's passes, against counts of what was served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lfr.lfr import Blend, Ledger, Phase, Plan, Schedule, preset
from megatron_lfr.lfr.identity import describe_phase, describe_segments, read_phase, read_plan
from megatron_lfr.lfr.journal import JournalFiles
from megatron_lfr.lfr.start import Started, start_phase

NO_JOURNAL = JournalFiles(Path("/nowhere"))
Arrays = dict[str, npt.NDArray[Any]]


def start_all(plan: Plan, seed: int = 1, arrays: Arrays | None = None) -> list[Started]:
    """Start every phase of a run in which harder blocks have higher ids."""
    ledger, started = Ledger.of(plan), []
    for planned in plan.phases:
        started.append(start_phase(plan, planned, ledger, seed, NO_JOURNAL, arrays or {}))
        losses = (1 + started[-1].order / 100).astype(np.float32)
        ledger.record_phase(planned.first_step, planned.global_batch_size, started[-1].order, losses)
    return started


def joined(started: Iterable[Started]) -> npt.NDArray[Any]:
    """Return the orders of the phases that were drawn at random, one after another."""
    return np.concatenate([one.order for one in started if one.selection is None])


@settings(max_examples=60, deadline=None)
@given(
    durations=st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.7]), min_size=2, max_size=5),
    focused=st.lists(st.booleans(), min_size=5, max_size=5),
    starts=st.sampled_from([[0, 60], [0, 20, 60], [0, 5, 6, 60]]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_no_block_comes_again_before_all_others(
    durations: list[float], focused: list[bool], starts: list[int], weighted: bool, seed: int
) -> None:
    """After each phase, of the corpora that are sampled together, no block has come twice more than another."""
    phases = [Phase("learn", durations[0])]
    for duration, focus in zip(durations[1:], focused, strict=False):
        phases += [Phase("focus", 0.2, drop=0.5)] * focus + [Phase("review", duration, passes="continued")]
    weights = [1.0 + i for i in range(len(starts) - 1)] if weighted else None
    plan = Schedule(tuple(phases)).plan(60, 8, 7, blend=Blend(starts, weights))
    visits = np.zeros(60, np.int64)
    for one in start_all(plan, seed):
        if one.selection is None:
            np.add.at(visits, one.order, 1)
        for part in np.split(visits, starts[1:-1]) if weighted else [visits]:
            assert part.max() - part.min() <= 1


@pytest.mark.parametrize("name", ["lfr", "learn-only"])
def test_without_selection_a_preset_has_the_order_of_uniform(name: str) -> None:
    """To the last sample, where each Focus is a Learn: a control that differs from `lfr` in the selection alone."""
    plan = preset(name).plan(500, 8, 4, train_epochs=2.3)
    served = joined(start_all(plan))
    uniform = preset("uniform").plan(500, 8, 4, train_epochs=2.3)
    (expected,) = start_all(uniform)
    assert len(served) == sum(p.samples for p in plan.phases if p.phase.kind != "focus")
    np.testing.assert_array_equal(served, expected.order[: len(served)])


@pytest.mark.parametrize("accepted", [False, True])
def test_the_review_in_the_place_of_a_focus_goes_on_too(accepted: bool) -> None:
    """A Focus that its guard declines takes its part of the pass, one that is trained takes none."""
    focus = Phase("focus", 0.3, drop=0.5, unseen="exclude", guard="file:worth", passes="continued")
    schedule = Schedule((Phase("learn", 0.4), focus, Phase("review", 0.5, passes="continued")))
    worth = np.arange(200, dtype=np.float32) if accepted else np.ones(200, np.float32)
    started = start_all(schedule.plan(200, 8, 4), arrays={"worth": worth})
    assert started[1].verdict is not None
    assert started[1].verdict.accepted == accepted
    (expected,) = start_all(Schedule((Phase("learn", 1.2),)).plan(200, 8, 4))
    served = joined(started)
    assert len(served) == (180 if accepted else 240)
    np.testing.assert_array_equal(served, expected.order[: len(served)])


def test_passes_begin_anew_where_a_phase_says_so() -> None:
    schedule = Schedule((Phase("learn", 0.7), Phase("learn", 0.4), Phase("review", 1.6, passes="continued")))
    orders = [one.order for one in start_all(schedule.plan(100, 8, 4))]
    for served in (np.concatenate(orders[1:])[:100], np.concatenate(orders[1:])[100:]):
        assert sorted(served) == list(range(100))


def test_a_scope_has_its_own_passes_and_what_it_replays_has_none() -> None:
    scoped = Phase("learn", 0.5, scope=("b",), replay=0.2)
    again = replace(scoped, passes="continued")
    plan = Schedule((scoped, again, Phase("review", 0.5, passes="continued"), again)).plan(
        100, 8, 4, blend=Blend([0, 40, 100]), names=["a", "b"]
    )
    orders = [one.order for one in start_all(plan)]
    inside = np.concatenate([order[order >= 40] for order in (orders[0], orders[1], orders[3])])
    assert len(inside) == 72  # of 90 samples, 18 are replayed
    visits = np.bincount(inside, minlength=100)[40:]
    assert visits.max() - visits.min() <= 1
    assert len({tuple(order[order < 40]) for order in (orders[0], orders[1], orders[3])}) == 3


def test_blocks_that_count_differently_have_no_passes() -> None:
    arrays: Arrays = {
        "weight": np.linspace(0, 1, 80, dtype=np.float32),
        "copies": (np.arange(80) // 4).astype(np.uint32),
    }
    for counting in ({"weight": "file:weight"}, {"copies": "once"}):
        orders = [
            [one.order for one in start_all(schedule.plan(80, 8, 4), arrays=arrays)]
            for schedule in (
                Schedule((Phase("learn", 0.5, **counting), Phase("review", 0.7, passes=passes, **counting)))  # type: ignore[arg-type]
                for passes in ("anew", "continued")
            )
        ]
        np.testing.assert_array_equal(np.concatenate(orders[0]), np.concatenate(orders[1]))
    weighted_first = Schedule((Phase("learn", 0.5, weight="file:weight"), Phase("review", 1.0, passes="continued")))
    review = start_all(weighted_first.plan(80, 8, 4), arrays=arrays)[1].order
    assert sorted(review) == list(range(80))


def test_runs_begun_before_keep_their_orders() -> None:
    phase = Phase("review", 0.5, passes="continued")
    assert describe_phase(phase)["passes"] == "continued"
    first = {name: value for name, value in describe_phase(phase).items() if name != "passes"}
    assert Phase(**read_phase(first)).passes == "anew"
    assert describe_phase(replace(phase, passes="anew")) == first
    plan = preset("lfr").plan(100, 8, 4, train_epochs=1)
    facts = {"format": 2, "seed": 1, "seq_length": 8, "segments": describe_segments(plan)}
    assert read_plan(facts)[0] == plan


def test_a_focus_has_no_passes_to_go_on_with() -> None:
    with pytest.raises(ValueError, match="phase passes continued: only a learn or review phase"):
        Phase("focus", 1, passes="continued")
    with pytest.raises(ValueError, match="phase passes 'again': choose from anew, continued"):
        Phase("learn", 1, passes="again")  # type: ignore[arg-type]
