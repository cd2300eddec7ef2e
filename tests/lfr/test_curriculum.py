"""The curriculum as a training loop sees it. What it served is counted here, not taken from the curriculum."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.lfr import Blend, Curriculum, Journal, Ledger, Phase, Plan, Schedule, preset

SEQ = 8


def hardness(n: int) -> np.ndarray:
    return np.random.default_rng(5).permutation(n) / n * 4 + 1


def loss_of(ids: np.ndarray, step: int, hard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (nll_sum, token_count) of each row for a model that improves with time; padded rows are garbage."""
    count = np.where(ids >= 0, SEQ, 0).astype(np.float32)
    nll = (hard[ids] * (1 + 1 / (1 + step))).astype(np.float32)
    return np.where(ids >= 0, nll * count, 123).astype(np.float32), count


def drive(curriculum: Curriculum, hard: np.ndarray, stop: int | None = None) -> list[list[int]]:
    served = []
    for step, ids in curriculum.steps():
        if step == stop:
            break
        served.append(ids.tolist())
        curriculum.record(step, *loss_of(ids, step, hard))
    return served


def by_phase(plan: Plan, served: list[list[int]]) -> list[Counter[int]]:
    return [Counter(i for row in served[p.first_step : p.end_step] for i in row if i >= 0) for p in plan.phases]


def make(tmp_path: Path, plan: Plan, **more: object) -> Curriculum:
    return Curriculum(plan, Journal(tmp_path / "journal", {"n": plan.n_blocks}), seed=3, **more)  # type: ignore[arg-type]


def test_lfr_v1_visits_what_the_paper_says(tmp_path: Path) -> None:
    n, hard = 100, hardness(100)
    plan = preset("lfr-v1").plan(n, SEQ, 8)
    learn, focus, review, last = by_phase(plan, drive(make(tmp_path, plan), hard))
    scored = {i: hard[i] * (1 + 1 / (1 + s)) for s, i in recorded_order(tmp_path, plan, phase=0)}
    harder_half = sorted(scored, key=lambda i: scored[i])[50:]
    assert learn == review == Counter(range(n))
    assert focus == Counter(harder_half)
    for s, i in recorded_order(tmp_path, plan, phase=2):
        scored[i] = hard[i] * (1 + 1 / (1 + s))
    hardest_30 = sorted(scored, key=lambda i: scored[i])[70:]
    assert last == Counter(dict.fromkeys(hardest_30, 5))


def recorded_order(tmp_path: Path, plan: Plan, phase: int) -> list[tuple[int, int]]:
    """Return (step, block) for a learn or review phase, as served by a second curriculum."""
    other = make(tmp_path / "twin", plan)
    served = drive(other, hardness(plan.n_blocks))
    planned = plan.phases[phase]
    return [(s, i) for s in range(planned.first_step, planned.end_step) for i in served[s] if i >= 0]


def test_clusters_visit_another_multiset_than_v1(tmp_path: Path) -> None:
    hard = np.exp(hardness(400))  # skewed
    counts = {}
    for name in ("lfr-v1", "lfr-clusters"):
        plan = preset(name).plan(400, SEQ, 8)
        counts[name] = by_phase(plan, drive(make(tmp_path / name, plan), hard))
    for v1, clusters in zip(counts["lfr-v1"], counts["lfr-clusters"], strict=True):
        assert v1.total() == clusters.total()
    assert counts["lfr-v1"][1] != counts["lfr-clusters"][1]
    assert len(set(counts["lfr-clusters"][1].values())) > 1  # harder blocks more often
    assert set(counts["lfr-v1"][1].values()) == {1}


def test_a_phases_last_batch_is_padded_and_nothing_is_lost(tmp_path: Path) -> None:
    plan = Schedule((Phase("learn", 1), Phase("focus", 1, "passes", drop=0.8), Phase("review", 0.5))).plan(21, SEQ, 8)
    served = drive(make(tmp_path, plan), hardness(21))
    assert [sum(i < 0 for i in row) for row in served] == [0, 0, 3, 3, 0, 6]
    learn, focus, review = by_phase(plan, served)
    assert learn == Counter(range(21))
    assert len(focus) == 21 - 16  # fewer blocks than a batch
    assert review.total() == 10
    assert set(review.values()) == {1}
    assert [len(np.load(tmp_path / f"journal/phase_{p:03d}.npy")) for p in range(2)] == [21, 5]


IMPROVEMENT = Schedule(
    (
        Phase("learn", 1.5),
        Phase("focus", 0.6, drop=0.3, score="improvement"),
        Phase("focus", 0.4, drop=0.4, score="improvement", sampling="choice", unseen="exclude"),
        Phase("review", 0.5),
    )
)


@pytest.mark.parametrize(
    "name", ["lfr", "lfr-v1", "lfr-clusters", "static", "focus-only", "random-focus", "improvement"]
)
def test_resuming_anywhere_serves_and_journals_the_same(tmp_path: Path, name: str) -> None:
    n, hard = 60, hardness(60)
    schedule = IMPROVEMENT if name == "improvement" else preset(name)
    plan = schedule.plan(n, SEQ, 8, train_epochs=3.0) if schedule.in_shares else schedule.plan(n, SEQ, 8)
    unbroken = make(tmp_path / "whole", plan)
    expected = drive(unbroken, hard)
    unbroken.state_dict()
    journal = sorted((tmp_path / "whole/journal").iterdir())
    boundaries = [p.end_step for p in plan.phases[:-1]]
    for stop in sorted({0, 1, 5, *boundaries, *(b + 1 for b in boundaries), plan.total_steps}):
        folder = tmp_path / f"stop{stop}"
        first = make(folder, plan)
        served = drive(first, hard, stop)
        state = json.loads(json.dumps(first.state_dict()))
        if stop + 3 < plan.total_steps:  # work that a kill loses
            for step, ids in first.steps():
                if step == stop + 3:
                    break
                first.record(step, *loss_of(ids, 0, hard))
        second = make(folder, plan)
        second.load_state_dict(state)
        np.testing.assert_equal(second.next_step, stop)
        served += drive(second, hard)
        second.state_dict()
        assert served == expected
        for path in journal:
            assert (folder / "journal" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("schedule", [preset("lfr"), IMPROVEMENT])
def test_replay_rebuilds_the_ledger(tmp_path: Path, schedule: Schedule) -> None:
    plan = schedule.plan(50, SEQ, 8, train_epochs=3.0 if schedule.in_shares else None)
    first = make(tmp_path, plan)
    drive(first, hardness(50), stop=15)
    second = make(tmp_path, plan)
    second.load_state_dict(first.state_dict())
    assert_same_ledger(second.ledger, first.ledger)


def assert_same_ledger(one: Ledger, other: Ledger) -> None:
    for field in ("nll", "step", "visits", "previous_nll", "previous_step"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    np.testing.assert_array_equal(one.detrended_scores(), other.detrended_scores())


def test_losses_that_are_not_finite_leave_scores_alone(tmp_path: Path) -> None:
    plan = Schedule((Phase("learn", 2),)).plan(8, SEQ, 8)
    curriculum = make(tmp_path, plan)
    steps = curriculum.steps()
    step, ids = next(steps)
    curriculum.record(step, np.full(8, 16, np.float32), np.full(8, 8, np.float32))
    before = curriculum.ledger.nll.copy()
    step, ids = next(steps)
    counts = np.full(8, 8, np.float32)
    counts[3] = 0  # every token masked
    curriculum.record(step, np.float32([np.nan, np.inf, 8, 0, -np.inf, 8, 8, 8]), counts)
    after = curriculum.ledger.nll
    assert np.isfinite(after).all()
    untouched = ids[[0, 1, 3, 4]]
    np.testing.assert_array_equal(after[untouched], before[untouched])
    assert (after[ids[[2, 5, 6, 7]]] == 1).all()
    curriculum.state_dict()
    assert np.load(tmp_path / "journal/phase_000.npy")[8:].tolist() == [-1, -1, 1, -1, -1, 1, 1, 1]


def test_nothing_of_a_skipped_step_counts(tmp_path: Path) -> None:
    """Ledger and journal, live and replayed, are as if its blocks had not been in the run."""
    plan = Schedule((Phase("learn", 2),)).plan(12, SEQ, 8)
    curriculum = make(tmp_path, plan)
    hard = hardness(12)
    for step, ids in curriculum.steps():
        if step == 1:
            before = {name: np.copy(getattr(curriculum.ledger, name)) for name in ("nll", "step", "visits")}
            curriculum.skip(step)
            for name, value in before.items():
                np.testing.assert_array_equal(getattr(curriculum.ledger, name), value)
            assert not curriculum.ledger.references[0].moments[:, 1].any()
        else:
            curriculum.record(step, *loss_of(ids, step, hard))
    with pytest.raises(ValueError, match="record: expected step 3"):
        curriculum.skip(1)
    assert curriculum.ledger.visits.sum() == 24 - 8
    state = curriculum.state_dict()
    entries = np.load(tmp_path / "journal/phase_000.npy")
    assert [entry == -1 for entry in entries] == [8 <= at < 16 for at in range(24)]
    again = make(tmp_path, plan)
    again.load_state_dict(state)
    assert_same_ledger(again.ledger, curriculum.ledger)


def test_records_must_come_in_order(tmp_path: Path) -> None:
    curriculum = make(tmp_path, Schedule((Phase("learn", 1),)).plan(16, SEQ, 8))
    losses = np.ones(8, np.float32)
    with pytest.raises(ValueError, match="expected step 0 of an entered phase, got step 0"):
        curriculum.record(0, losses, losses)
    curriculum.enter_phase()
    with pytest.raises(ValueError, match="expected step 0 of an entered phase, got step 1"):
        curriculum.record(1, losses, losses)


def test_a_loop_that_forgets_to_record_is_told(tmp_path: Path) -> None:
    steps = make(tmp_path, Schedule((Phase("learn", 1),)).plan(16, SEQ, 8)).steps()
    assert next(steps)[0] == 0
    with pytest.raises(ValueError, match="step 0 is not recorded"):
        next(steps)


@pytest.mark.parametrize(
    ("nll_sum", "token_count", "legal"),
    [((8,), (8,), True), ((3,), (3,), True), ((3,), (8,), True), ((2,), (3,), False), ((8,), (1,), False),
     ((), (8,), False), ((8, 1), (8,), False), ((8,), (9,), False)],
)  # fmt: skip
def test_losses_of_another_shape_are_refused(
    nll_sum: tuple[int, ...], token_count: tuple[int, ...], legal: bool, tmp_path: Path
) -> None:
    """The step has three blocks in eight rows."""
    curriculum = make(tmp_path, Schedule((Phase("learn", 1),)).plan(3, SEQ, 8))
    curriculum.enter_phase()
    if legal:
        curriculum.record(0, np.full(nll_sum, 6.0), np.full(token_count, 2.0))
        assert curriculum.ledger.nll.tolist() == [3.0, 3.0, 3.0]
    else:
        with pytest.raises(ValueError, match=r"record: (nll_sum|token_count) has shape .*, but step 0 has 3 blocks"):
            curriculum.record(0, np.ones(nll_sum), np.ones(token_count))
        assert curriculum.next_step == 0


RESCORED = Schedule((Phase("learn", 0.5), Phase("focus", 1, "passes", drop=0.5, score="rescored"), Phase("review", 1)))


def test_rescored_focus_follows_the_callback(tmp_path: Path) -> None:
    n, hard = 40, hardness(40)
    asked: list[int] = []

    def rescore(ids: np.ndarray) -> Iterator[np.ndarray]:
        asked.extend(ids.tolist())
        yield from np.split(hard[ids].astype(np.float32), [7, 8, 30])

    plan = RESCORED.plan(n, SEQ, 8)
    _, focus, _ = by_phase(plan, drive(make(tmp_path, plan, rescore=rescore), np.ones(n)))
    assert asked == list(range(n))
    assert focus == Counter(np.argsort(hard)[20:].tolist())
    np.testing.assert_array_equal(np.load(tmp_path / "journal/phase_001.scores.npy"), hard.astype(np.float32))


def test_an_interrupted_rescoring_goes_on_where_it_stopped(tmp_path: Path) -> None:
    n, hard = 40, hardness(40)
    plan = RESCORED.plan(n, SEQ, 8)
    asked: list[int] = []
    fail_at = 24

    def rescore(ids: np.ndarray) -> Iterator[np.ndarray]:
        for batch in np.split(ids, range(8, len(ids), 8)):
            if batch[0] == fail_at:
                raise KeyboardInterrupt
            asked.extend(batch.tolist())
            yield hard[batch].astype(np.float32)

    first = make(tmp_path, plan, rescore=rescore)
    boundary = plan.phases[1].first_step
    drive_to_boundary(first, hard, boundary)
    state = first.state_dict()
    with pytest.raises(KeyboardInterrupt):
        first.enter_phase()
    assert asked == list(range(24))
    fail_at = -1
    second = make(tmp_path, plan, rescore=rescore)
    second.load_state_dict(state)
    drive(second, hard)
    assert asked == list(range(n))
    # From an earlier place the weights differ: the scores are made again.
    asked.clear()
    third = make(tmp_path, plan, rescore=rescore)
    checksum = zlib.crc32(np.load(tmp_path / "journal/phase_000.npy")[:8])
    third.load_state_dict(state | {"step": 1, "entries": 8, "checksum": checksum})
    drive(third, hard)
    assert asked == list(range(n))


def drive_to_boundary(curriculum: Curriculum, hard: np.ndarray, boundary: int) -> None:
    curriculum.enter_phase()
    for step, ids in curriculum.remaining_steps():
        curriculum.record(step, *loss_of(ids, step, hard))
    assert curriculum.next_step == boundary


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (np.ones(39, np.float32), "the callback gave the losses of 39 blocks, but there are 40"),
        (np.append(np.ones(39), np.nan), r"blocks 0\.\.39 have a loss that is not finite"),
    ],
)
def test_a_rescoring_that_is_not_whole_is_refused(tmp_path: Path, losses: np.ndarray, message: str) -> None:
    plan = RESCORED.plan(40, SEQ, 8)
    curriculum = make(tmp_path, plan, rescore=lambda ids: [losses])
    drive_to_boundary(curriculum, hardness(40), plan.phases[1].first_step)
    with pytest.raises(ValueError, match=message):
        curriculum.enter_phase()
    assert not (tmp_path / "journal/phase_001.scores.npy").exists()


def test_rescoring_needs_a_callback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rescore callback"):
        make(tmp_path, RESCORED.plan(10, SEQ, 8))


def test_an_edited_journal_that_leads_elsewhere_is_noticed(tmp_path: Path) -> None:
    plan = preset("lfr-v1").plan(60, SEQ, 8)
    first = make(tmp_path, plan)
    drive(first, hardness(60), stop=10)
    state = first.state_dict()
    path = tmp_path / "journal/phase_000.npy"
    entries = np.load(path)
    np.save(path, entries[::-1].copy())
    with pytest.raises(ValueError, match="replays to an order other than"):
        make(tmp_path, plan).load_state_dict(state)


@pytest.mark.parametrize("scope", ["global", "per-corpus"])
def test_a_blend_is_drawn_and_replayed(tmp_path: Path, scope: str) -> None:
    n, hard = 100, hardness(100)
    blend = Blend([0, 20, 100], [1.0, 1.0], scope)  # type: ignore[arg-type]
    plan = preset("lfr").plan(n, SEQ, 8, train_epochs=3, blend=blend)
    served = drive(make(tmp_path, plan), hard)
    for planned, counts in zip(plan.phases, by_phase(plan, served), strict=True):
        of_first = sum(count for block, count in counts.items() if block < 20)
        if planned.phase.kind != "focus" or scope == "per-corpus":
            assert abs(of_first - planned.samples / 2) <= 0.5
    for stop in (plan.phases[1].first_step + 1, plan.phases[3].end_step - 1):
        folder = tmp_path / str(stop)
        begun = make(folder, plan)
        first = drive(begun, hard, stop)
        state = begun.state_dict()
        resumed = make(folder, plan)
        resumed.load_state_dict(state)
        assert first + drive(resumed, hard) == served


def test_a_blend_of_another_corpus() -> None:
    with pytest.raises(ValueError, match="the blend has 99 blocks, but the corpus has 100"):
        preset("lfr-v1").plan(100, SEQ, 8, blend=Blend([0, 99]))
