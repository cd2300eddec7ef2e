"""Learn and Review phases that go on with each other's passes, against counts of what was served."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lfr.config.run import run_schedule
from megatron_lfr.config.training import LFRConfig
from megatron_lfr.lfr import Blend, Ledger, Phase, Plan, Schedule, preset
from megatron_lfr.lfr.chain import Chain
from megatron_lfr.lfr.identity import describe_phase, describe_segments, read_phase, read_plan
from megatron_lfr.lfr.journal import JournalFiles
from megatron_lfr.lfr.selection import make_order
from megatron_lfr.lfr.start import PhaseStart, start_phase
from megatron_lfr.lfr.weights import Counting

NO_JOURNAL = JournalFiles(Path("/nowhere"))
Arrays = dict[str, npt.NDArray[Any]]


def start_all(plan: Plan, seed: int = 1, arrays: Arrays | None = None) -> list[PhaseStart]:
    """Start every phase of a run in which harder blocks have higher ids."""
    ledger, started = Ledger.of(plan), []
    for planned in plan.phases:
        started.append(start_phase(plan, planned, ledger, seed, NO_JOURNAL, arrays or {}))
        losses = (1 + started[-1].order / 100).astype(np.float32)
        ledger.record_phase(planned.first_step, planned.global_batch_size, started[-1].order, losses)
    return started


def orders_of(plan: Plan, arrays: Arrays | None = None) -> list[npt.NDArray[Any]]:
    """Return the order of every phase."""
    return [one.order for one in start_all(plan, arrays=arrays)]


def joined(started: Iterable[PhaseStart]) -> npt.NDArray[Any]:
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


@pytest.mark.parametrize("epochs", [1.0, 2.0, 2.7])
@pytest.mark.parametrize("name", ["lfr", "learn-only"])
def test_without_selection_a_preset_has_the_order_of_uniform(name: str, epochs: float) -> None:
    """To the last sample, where each Focus is a Learn: a control that differs from `lfr` in the selection alone. In the
    first pass, `lfr` has none."""
    plan = preset(name).plan(500, 8, 4, train_epochs=epochs)
    started = start_all(plan)
    focused = [planned.index for planned, one in zip(plan.phases, started, strict=True) if one.selection is not None]
    expected_focus = {1.0: [], 2.0: [3], 2.7: [1, 3]} if name == "lfr" else {}
    assert focused == expected_focus.get(epochs, [])
    served = joined(started)
    (expected,) = start_all(preset("uniform").plan(500, 8, 4, train_epochs=epochs))
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
    orders = orders_of(schedule.plan(100, 8, 4))
    for served in (np.concatenate(orders[1:])[:100], np.concatenate(orders[1:])[100:]):
        assert sorted(served) == list(range(100))


def test_a_scope_has_its_own_passes_and_what_it_replays_has_none() -> None:
    scoped = Phase("learn", 0.5, scope=("b",), replay=0.2)
    again = replace(scoped, passes="continued")
    review, blend = Phase("review", 0.5, passes="continued"), Blend([0, 40, 100])
    orders, anew = (
        orders_of(Schedule((scoped, more, review, more)).plan(100, 8, 4, blend=blend, names=["a", "b"]))
        for more in (again, scoped)
    )
    inside = np.concatenate([order[order >= 40] for order in (orders[0], orders[1], orders[3])])
    assert len(inside) == 72  # of 90 samples, 18 are replayed
    visits = np.bincount(inside, minlength=100)[40:]
    assert visits.max() - visits.min() <= 1
    for order, other in zip(orders, anew, strict=True):
        np.testing.assert_array_equal(order[order < 40], other[other < 40])


@pytest.mark.parametrize("blend", [Blend([0, 80]), Blend([0, 30, 80], [2.0, 1.0])], ids=["one corpus", "two"])
@pytest.mark.parametrize("accepted", [False, True])
def test_passes_by_a_weight(accepted: bool, blend: Blend) -> None:
    """At any time, each block has come as often as it weighs, relative to the heaviest, which comes once a pass."""
    weight = np.linspace(0, 2, 80, dtype=np.float32)
    by_weight: dict[str, Any] = {"weight": "file:weight", "passes": "continued"}
    focus = Phase("focus", 0.5, drop=0.5, unseen="exclude", guard="file:worth", guard_gain=0.1, **by_weight)
    phases = (Phase("learn", 0.7, **by_weight), focus, *[Phase("review", 3.3, **by_weight)] * 12)
    plan = Schedule(phases).plan(80, 8, 4, blend=blend)
    worth = np.arange(80, dtype=np.float32) if accepted else np.ones(80, np.float32)
    started = start_all(plan, arrays={"weight": weight, "worth": worth})
    assert started[1].verdict is not None
    assert started[1].verdict.accepted == accepted
    served = joined(started)
    for first, last in itertools.pairwise(blend.starts):
        part = served[(served >= first) & (served < last)] - first
        factors = (weight[first:last] / weight[first:last].max()).astype(np.float64)
        come = np.cumsum(part[:, None] == np.arange(last - first), axis=0)
        passes = come[:, -1:]  # of the heaviest: the pass now served is this one or the next
        assert passes[-1] > 25
        assert (come >= np.floor((passes - 1) * factors + 1e-6)).all()
        assert (come <= np.ceil((passes + 1) * factors - 1e-6)).all()


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-6, 0.01, 0.3, 0.5, 1.0]), min_size=1, max_size=40),
    parts=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_an_order_by_a_weight_goes_on_where_it_was_cut(weights: list[float], parts: list[int], seed: int) -> None:
    """Also among passes that are so short that several are shuffled together, and where most blocks weigh nothing."""
    weight = np.array([*weights, 1.0], np.float32)
    unscored = np.full(len(weight), np.nan, np.float32)
    phase = Phase("learn", 1, weight="file:weight", weight_cap=1e6)
    taken: tuple[int, ...] = ()
    served = []
    for samples in parts:
        served.append(make_order(phase, unscored, samples, seed, 5, Counting(weight, chain=Chain(2, taken)))[0])
        taken = (*taken, samples)
    joint, _ = make_order(phase, unscored, sum(parts), seed, 2, Counting(weight))
    np.testing.assert_array_equal(np.concatenate(served), joint)
    assert (weight[joint] > 0).all()


@pytest.mark.parametrize("light", [0.5, 0.001])
def test_passes_are_shuffled_together_where_they_are_short(light: float) -> None:
    """Then, too, a block comes as often as it weighs beside the heaviest."""
    weight = np.full(4000, light, np.float32)
    weight[:8] = 1
    phase = Phase("learn", 1, weight="file:weight", weight_cap=1e6)
    order, _ = make_order(phase, np.full(4000, np.nan, np.float32), 20_000, 1, 0, Counting(weight))
    visits = np.bincount(order, minlength=4000)
    passes = 20_000 / weight.sum()
    in_group = 1 if light == 0.5 else 4000 // 8 / weight.sum()
    assert abs(visits[:8] - passes).max() <= 1.5 * in_group
    assert abs(visits[8:] - passes * light).max() <= 1.5


def test_the_beginning_of_a_chain_does_not_hang_on_its_end() -> None:
    arrays: Arrays = {"weight": np.linspace(0, 1, 80, dtype=np.float32)}
    by_weight: dict[str, Any] = {"weight": "file:weight", "passes": "continued"}
    ends = ([Phase("review", 1.3, **by_weight)], [Phase("focus", 0.4, drop=0.5), Phase("review", 0.8, **by_weight)])
    orders = [
        joined(start_all(Schedule((Phase("learn", 0.7, **by_weight), *end)).plan(80, 8, 4), arrays=arrays))
        for end in ends
    ]
    shorter = min(map(len, orders))
    np.testing.assert_array_equal(orders[0][:shorter], orders[1][:shorter])


def test_other_weights_begin_anew() -> None:
    arrays: Arrays = {"weight": np.linspace(0, 1, 80, dtype=np.float32)}
    by_weight: dict[str, Any] = {"weight": "file:weight", "passes": "continued"}
    phases = (Phase("learn", 0.5, **by_weight), Phase("review", 1.0, passes="continued"))
    assert sorted(orders_of(Schedule(phases).plan(80, 8, 4), arrays)[1]) == list(range(80))
    power = replace(phases[0], weight_power=0.5)
    orders = [
        orders_of(Schedule((first, power)).plan(80, 8, 4), arrays)[1] for first in (phases[0], Phase("learn", 0.5))
    ]
    np.testing.assert_array_equal(orders[0], orders[1])


def test_by_a_weight_where_each_focus_is_declined_a_preset_has_the_order_of_uniform() -> None:
    arrays: Arrays = {"weight": np.tile(np.array([0, 0.3, 1], np.float32), 200)}
    config = {name: LFRConfig(lfr_schedule=name, lfr_scores=["weight=x.npy"]) for name in ("lfr", "uniform")}
    lfr, uniform = (run_schedule(config[name]).plan(600, 8, 4, train_epochs=2.3) for name in ("lfr", "uniform"))
    started = start_all(lfr, arrays=arrays)
    assert all(one.selection is None for one in started)  # most samples are of the heaviest: none is worth more
    (expected,) = orders_of(uniform, arrays)
    np.testing.assert_array_equal(joined(started), expected)


def test_copies_have_their_turns_as_before() -> None:
    arrays: Arrays = {"copies": (np.arange(80) // 4).astype(np.uint32)}
    learn, review = Phase("learn", 0.5, copies="once"), Phase("review", 0.7, copies="once")
    anew, continued = (
        np.concatenate(orders_of(Schedule((learn, last)).plan(80, 8, 4), arrays))
        for last in (review, replace(review, passes="continued"))
    )
    np.testing.assert_array_equal(anew, continued)


def test_runs_begun_before_keep_their_orders() -> None:
    phase = Phase("review", 0.5, passes="continued")
    assert describe_phase(phase)["passes"] == "continued"
    first = {name: value for name, value in describe_phase(phase).items() if name != "passes"}
    assert Phase(**read_phase(first)).passes == "anew"
    assert describe_phase(replace(phase, passes="anew")) == first
    plan = preset("lfr").plan(100, 8, 4, train_epochs=1)
    facts = {"format": 2, "seed": 1, "seq_length": 8, "segments": describe_segments(plan)}
    assert read_plan(facts)[0] == plan


@pytest.mark.parametrize(
    ("phase", "by_rule"),
    [
        (Phase("learn", 1, weight="file:w"), True),
        (Phase("focus", 1, drop=0.5, weight="file:w", explore=0.1), True),
        (Phase("focus", 1, drop=0.5, weight="file:w", least_scored=0.5), True),
        (Phase("focus", 1, drop=0.5, weight="file:w"), False),
        (Phase("review", 1), False),
    ],
)
def test_a_run_that_sampled_by_a_weight_by_another_rule_is_refused(phase: Phase, by_rule: bool) -> None:
    """Whichever phase is trained now: later orders follow from the losses of those before."""
    plan = Schedule((Phase("learn", 1), phase, Phase("review", 1))).plan(100, 8, 4)
    facts = {"format": 2, "seed": 1, "seq_length": 8, "segments": describe_segments(plan, [{"w": "digest"}])}
    assert read_plan(facts)[0] == plan
    assert ("orders_by_weight" in facts["segments"][0]) == by_rule
    facts["segments"][0].pop("orders_by_weight", None)
    if by_rule:
        with pytest.raises(ValueError, match="samples by a weight, and did so by another rule"):
            read_plan(facts)
    else:
        assert read_plan(facts)[0] == plan


def test_a_focus_has_no_passes_to_go_on_with() -> None:
    with pytest.raises(ValueError, match="phase passes continued: only a learn or review phase"):
        Phase("focus", 1, passes="continued")
    with pytest.raises(ValueError, match="phase passes 'again': choose from anew, continued"):
        Phase("learn", 1, passes="again")  # type: ignore[arg-type]
