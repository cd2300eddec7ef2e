"""Plans of several segments, as a training loop sees them: which blocks are served, counted here."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lfr.lfr import UNRECORDED, Blend, Curriculum, Journal, Ledger, Phase, Plan, Schedule, preset
from megatron_lfr.lfr.identity import FORMAT, describe_segments, read_plan
from megatron_lfr.lfr.schedule import with_length
from support.order_oracles import kept_by_threshold

SEQ = 8
OLD, NEW = Blend([0, 30, 60]), Blend([0, 30, 60, 100])


def extend(schedule: Schedule, past: Plan, steps: int, blend: Blend = NEW, batch: int = 8) -> Plan:
    return schedule.plan(blend.starts[-1], SEQ, batch, blend=blend, past=past, train_iters=steps)


def first_segment(name: str = "lfr", steps: int = 20) -> Plan:
    return preset(name).plan(60, SEQ, 8, blend=OLD, train_iters=steps)


def replaying(schedule: Schedule, share: float) -> Schedule:
    return Schedule((replace(schedule.phases[0], replay=share), *schedule.phases[1:]))


def hardness(n: int) -> np.ndarray:
    return np.random.default_rng(5).permutation(n) / n * 4 + 1


def drive(curriculum: Curriculum, stop: int | None = None) -> list[list[int]]:
    """Serve steps up to `stop`; a model that improves with time records them."""
    served, hard = [], hardness(1000)
    for step, ids in curriculum.steps():
        if step == stop:
            break
        served.append(ids.tolist())
        count = np.where(ids >= 0, SEQ, 0).astype(np.float32)
        curriculum.record(step, (hard[ids] * (1 + 1 / (1 + step)) * count).astype(np.float32), count)
    return served


def make(folder: Path, plan: Plan) -> Curriculum:
    return Curriculum(plan, Journal(folder / "journal", {}), seed=3, rescore=lambda ids: [hardness(1000)[ids] / 2])


def counts(plan: Plan, served: list[list[int]]) -> list[Counter[int]]:
    return [Counter(i for row in served[p.first_step : p.end_step] for i in row if i >= 0) for p in plan.phases]


def test_shares_are_of_the_segment_and_the_past_is_frozen() -> None:
    past = first_segment()
    plan = extend(preset("lfr"), past, 50, batch=4)
    assert plan.phases[:5] == past.phases
    assert [p.first_step for p in plan.phases[5:]] == [20, 40, 47, 57, 62]
    assert [p.samples for p in plan.phases[5:]] == [80, 28, 40, 20, 32]  # 40, 14, 20, 10 and 16 % of 50 steps of 4
    assert plan.total_steps == 70
    assert plan.samples_before(22) == past.total_samples + 8
    assert plan.at_step(20).corpora == (2,)
    assert [p.corpora for p in plan.phases[6:]] == [None] * 4


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    at=st.data(),
    replay=st.sampled_from([0.0, 0.1, 0.5]),
    steps=st.integers(1, 30),
    batch=st.integers(1, 9),
)
def test_a_segment_begins_with_the_new_and_a_share_of_the_old(
    sizes: list[int], at: st.DataObject, replay: float, steps: int, batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    starts = [0, *np.cumsum(sizes).tolist()]
    old = at.draw(st.integers(1, len(sizes) - 1))
    n_old, n = starts[old], starts[-1]
    past = preset("uniform").plan(n_old, SEQ, 7, blend=Blend(starts[: old + 1]), train_iters=2)
    plan = extend(replaying(preset("uniform"), replay), past, steps, Blend(starts), batch)
    served = drive(make(tmp_path_factory.mktemp("run"), plan))
    before, learned = counts(plan, served)
    assert max(before) < n_old  # ids of old blocks do not move
    samples = steps * batch
    of_old = sum(count for block, count in learned.items() if block < n_old)
    assert of_old == round(replay * samples)
    assert learned.total() == samples
    for low, high, share in ((0, n_old, of_old), (n_old, n, samples - of_old)):
        visits = [learned[block] for block in range(low, high)]
        assert set(visits) <= {share // (high - low), -(-share // (high - low))}  # complete passes and a part of one


def test_replayed_blocks_are_mixed_throughout(tmp_path: Path) -> None:
    past = preset("uniform").plan(1000, SEQ, 8, blend=Blend([0, 1000]), train_iters=1)
    plan = extend(replaying(preset("uniform"), 0.25), past, 1000, Blend([0, 1000, 2000]))
    curriculum = make(tmp_path, plan)
    order, _ = plan.make_order(plan.phases[1], curriculum.ledger.recorded_scores(), 3)
    old = (order < 1000).reshape(100, 80).sum(axis=1)
    assert old.sum() == 2000
    assert 8 <= old.min() < old.max() <= 34  # 20 of 80, within four standard deviations


def test_a_focus_ranks_all_blocks_old_and_new(tmp_path: Path) -> None:
    learn, review = Phase("learn", 1), Phase("review", 0.5)
    schedule = Schedule((learn, Phase("focus", 1, "passes", drop=0.4), review))
    past = schedule.plan(60, SEQ, 8, blend=OLD)
    plan = schedule.plan(100, SEQ, 8, blend=NEW, past=past)
    assert [p.samples for p in plan.phases] == [60, 36, 30, 40, 60, 50]  # an epoch of Learn is of the new blocks
    curriculum = make(tmp_path, plan)
    served = drive(curriculum, plan.phases[4].first_step)
    scores = np.full(100, np.nan, np.float32)
    for step, row in enumerate(served):
        for block in row:
            if block >= 0:
                scores[block] = np.float32(hardness(1000)[block] * (1 + 1 / (1 + step)) * SEQ) / np.float32(SEQ)
    focus = counts(plan, served + drive(curriculum))[4]
    assert focus == Counter(kept_by_threshold(scores, 0.4, keep_unseen=True))


def test_scopes_of_phases(tmp_path: Path) -> None:
    phases = (
        Phase("learn", 8, "steps", scope="new", replay=0.5),
        Phase("focus", 2, "steps", drop=0.5, scope=("web", "code")),
        Phase("review", 5, "steps", scope=("web",)),
        Phase("learn", 13, "steps", scope="all"),
    )
    names = ["web", "books", "code"]
    plan = Schedule(phases).plan(100, SEQ, 8, blend=NEW, past=first_segment(), names=names)
    assert [p.corpora for p in plan.phases[5:]] == [(2,), (0, 2), (0,), None]
    curriculum = make(tmp_path, plan)
    served = drive(curriculum, plan.phases[6].end_step - 1)
    selection = curriculum.current.selection  # type: ignore[union-attr]
    assert selection is not None
    left_out = selection.left_out(curriculum.current.scores)  # type: ignore[union-attr]
    assert left_out[30:60].all()
    assert left_out.sum() == 30 + selection.dropped
    served += drive(curriculum)
    learn, focus, review, last = counts(plan, served)[5:]
    assert sum(count for block, count in learn.items() if block >= 60) == 32
    assert not set(focus) & {*range(30, 60), *np.flatnonzero(left_out).tolist()}
    assert set(review) == set(range(30))
    assert set(last) == set(range(100))
    with pytest.raises(ValueError, match="phase 1: scope 'code': choose from 'a', 'b', 'c'"):
        Schedule((phases[0], replace(phases[1], scope=("code",)))).plan(
            100, SEQ, 8, blend=NEW, past=first_segment(), names=["a", "b", "c"]
        )


@pytest.mark.parametrize(
    ("phase", "blend", "message"),
    [
        (Phase("learn", 1, scope="new"), OLD, "phase 0: scope new: the segment has no new blocks"),
        (Phase("learn", 1, replay=0.1), OLD, "phase 0: replay 0.1: the phase is about all blocks"),
        (Phase("learn", 1), Blend([0, 20, 60]), r"must be those of the segments before: \[0, 30, 60\]"),
    ],
)
def test_what_a_segment_cannot_be(phase: Phase, blend: Blend, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule((phase,)).plan(blend.starts[-1], SEQ, 8, blend=blend, past=first_segment())


@pytest.mark.parametrize("row", [{"scope": "old"}, {"scope": []}, {"replay": 1.0}, {"kind": "focus", "replay": 0.5}])
def test_scopes_and_shares_that_are_none(row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"phase 0: phase (scope|replay)"):
        Schedule.from_dicts([{"kind": "learn", "duration": 1, **row}])


def test_a_learn_goes_on_with_its_pass(tmp_path: Path) -> None:
    """Whatever the batch sizes, the blocks are those of one run, one after the other."""
    uniform = preset("uniform")
    plan = uniform.plan(60, SEQ, 8, blend=OLD, train_iters=4)  # 32 of the 60 blocks
    for steps, batch in ((5, 2), (3, 25), (7, 11)):
        plan = extend(uniform, plan, steps, OLD, batch)
    served = [block for row in drive(make(tmp_path / "several", plan)) for block in row]
    straight = uniform.plan(60, SEQ, 1, blend=OLD, train_iters=len(served))
    assert served == [block for row in drive(make(tmp_path / "one", straight)) for block in row]
    parts = preset("learn-only").plan(60, SEQ, 4, blend=OLD, train_iters=25)  # five phases of one pass after another
    served = [block for row in drive(make(tmp_path / "parts", extend(uniform, parts, 9, OLD, 4))) for block in row]
    straight = uniform.plan(60, SEQ, 4, blend=OLD, train_iters=34)
    assert served == [block for row in drive(make(tmp_path / "whole run", straight)) for block in row]
    weighted = replace(OLD, weights=[1, 2])
    other = extend(uniform, uniform.plan(60, SEQ, 8, blend=weighted, train_iters=4), 5, weighted)
    assert other.phases[1].earlier == 0


@pytest.mark.parametrize("name", ["lfr", "uniform", "random-focus"])
def test_resuming_anywhere_serves_the_same_before_and_after_an_extension(tmp_path: Path, name: str) -> None:
    schedule, past = preset(name), first_segment(name)
    plan = extend(replaying(schedule, 0.2), past, 20, batch=4)
    unbroken = make(tmp_path / "unbroken", plan)
    expected = drive(unbroken)
    unbroken.state_dict()
    journal = sorted((tmp_path / "unbroken/journal").glob("*.npy"))
    boundaries = [p.end_step for p in plan.phases[:-1]]
    for stop in sorted({0, 1, *boundaries, *(b + 1 for b in boundaries), plan.total_steps}):
        folder = tmp_path / f"stop{stop}"
        begun = make(folder, past if stop <= past.total_steps else plan)  # extended while it was stopped, or before
        served = drive(begun, stop)
        state = json.loads(json.dumps(begun.state_dict()))
        resumed = make(folder, plan)
        resumed.load_state_dict(state)
        assert served + drive(resumed) == expected
        resumed.state_dict()
        assert [path.read_bytes() for path in sorted((folder / "journal").glob("*.npy"))] == [
            path.read_bytes() for path in journal
        ]


def test_a_rescored_focus_asks_for_the_blocks_of_its_segment(tmp_path: Path) -> None:
    schedule = Schedule((Phase("learn", 0.5), Phase("focus", 0.5, drop=0.5, score="rescored"), Phase("review", 0.1)))
    past = schedule.plan(60, SEQ, 8, blend=OLD)
    plan = schedule.plan(100, SEQ, 8, blend=NEW, past=past)
    drive(make(tmp_path, plan))
    sizes = [len(np.load(tmp_path / f"journal/phase_{phase:03d}.scores.npy")) for phase in (1, 4)]
    assert sizes == [60, 100]


def test_facts_say_it_all() -> None:
    past = first_segment()
    plan = extend(replaying(preset("lfr"), 0.2), past, 20, batch=4)
    plan = extend(preset("uniform"), plan, 10)  # without new blocks
    facts = {"format": FORMAT, "seed": 3, "seq_length": SEQ, "segments": describe_segments(plan)}
    facts = json.loads(json.dumps(facts))
    restored, seed = read_plan(facts)
    assert (restored.phases, seed) == (plan.phases, 3)
    assert [segment.old_blocks for segment in restored.segments] == [0, 60, 100]
    one = json.loads(json.dumps(describe_segments(past)))
    assert facts["segments"][:1] == one
    assert all("scope" not in phase and "replay" not in phase for phase in one[0]["schedule"])
    assert "scopes" not in one[0]
    for key, wrong in (("scopes", [[7]]), ("scopes", []), ("blocks", 99), ("samples", [1])):
        damaged = json.loads(json.dumps(facts))
        damaged["segments"][1][key] = wrong
        with pytest.raises(ValueError, match=key if key != "blocks" else "blend"):
            read_plan(damaged)


def test_another_length_cuts_or_lengthens_a_segment() -> None:
    plan = extend(preset("uniform"), first_segment("uniform"), 30)
    assert with_length(plan, 40).phases[1].samples == 160
    assert with_length(plan, 40).segments[0] == plan.segments[0]
    assert with_length(plan, 70).phases[1].samples == 400
    assert len(with_length(plan, 15).segments) == 1
    assert with_length(plan, 15).total_steps == 15


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 12), share=st.sampled_from([0.0, 0.2, 0.5]))
def test_blocks_of_a_segment_are_measured_by_themselves(seed: int, batch: int, share: float) -> None:
    """The scores are those of two ledgers, each of which hears of its blocks alone."""
    rng = np.random.default_rng(seed)
    both, old, new = Ledger(50, 60, Blend([0, 30]), Blend([0, 30, 50])), Ledger(30, 60), Ledger(20, 60)
    for step in range(60):
        if step in (20, 35, 50):
            focus = step == 35
            both.begin_phase(step, focus, segment=int(step >= 20))
            old.begin_phase(step, focus)
            new.begin_phase(step, focus)
        is_old = rng.random(batch) < (1.0 if step < 20 else share)
        ids = np.where(is_old, rng.integers(0, 30, batch), rng.integers(30, 50, batch))
        nll = np.where(is_old, 3 - step / 40, 5 - step / 30).astype(np.float32) + rng.random(batch).astype(np.float32)
        both.record(step, ids, nll)
        old.record(step, np.where(is_old, ids, 0), np.where(is_old, nll, UNRECORDED))
        new.record(step, np.where(is_old, 0, ids - 30), np.where(is_old, UNRECORDED, nll))
    separate = np.concatenate((old.detrended_scores(), new.detrended_scores()))
    np.testing.assert_array_equal(both.detrended_scores(), separate)


def test_replay_shows_how_the_model_has_moved_on_old_blocks(tmp_path: Path) -> None:
    """After an extension, what old blocks' losses amount to is near their present loss; what was recorded is not."""
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 0.3, 4000)
    past = preset("uniform").plan(2000, SEQ, 16, blend=Blend([0, 2000]), train_iters=250)
    plan = extend(replaying(preset("uniform"), 0.3), past, 250, Blend([0, 2000, 4000]), 16)

    def loss(ids: np.ndarray, step: int) -> np.ndarray:
        old = 2 + 4 / (1 + step / 20) + 1.0 * (step >= 250) * (step - 250) / 250  # is forgotten later
        new = 5 - 2 * max(0, step - 250) / 250
        return np.where(ids < 2000, old, new) + hard[ids]

    curriculum = Curriculum(plan, Journal(tmp_path, {}), seed=1)
    for step, ids in curriculum.steps():
        count = np.where(ids >= 0, SEQ, 0).astype(np.float32)
        curriculum.record(step, (loss(ids, step) * count).astype(np.float32), count)
    present = loss(np.arange(4000), plan.total_steps - 1)
    recorded, detrended = curriculum.ledger.recorded_scores(), curriculum.ledger.detrended_scores()
    for part in (slice(0, 2000), slice(2000, 4000)):
        assert abs(np.nanmean(detrended[part] - present[part])) < 0.15  # a mean of the last 256 samples
        assert abs(np.nanmean(recorded[part] - present[part])) > 0.3
