"""Runs replayed from their folders, against what was served and recorded when they were made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.analysis.replay import Run, open_run
from megatron_lfr.lfr import Curriculum, Journal, Ledger, Phase, Plan, Schedule, preset
from megatron_lfr.lfr.identity import FORMAT, describe_segments

N, SEQ, BATCH, SEED = 61, 4, 8, 3
RESCORED = Schedule((Phase("learn", 1), Phase("focus", 1, "passes", drop=0.5, score="rescored"), Phase("review", 1)))
IMPROVEMENT = Schedule((Phase("learn", 1.5), Phase("focus", 1, drop=0.5, score="improvement"), Phase("review", 1)))
SCHEDULES = {name: preset(name) for name in ("lfr", "lfr-v1", "lfr-clusters", "random-focus")} | {
    "rescored": RESCORED,
    "improvement": IMPROVEMENT,
}

Visit = tuple[int, int, int, float]
"""(block, step from 1, phase, loss; NaN: none)"""


def train(folder: Path, schedule: Schedule, stop: int | None = None) -> tuple[Plan, Curriculum, list[Visit]]:
    """Return a run with random losses, some of them not finite, and every visit in the order of training."""
    epochs = 3.0 if schedule.in_shares else None
    plan = schedule.plan(N, SEQ, BATCH, train_epochs=epochs)
    identity = {"format": FORMAT, "seed": SEED, "seq_length": SEQ, "segments": describe_segments(plan)}
    rng = np.random.default_rng(5)
    rescored = rng.gamma(4, 1, N).astype(np.float32)
    journal = Journal(folder / "journal", identity)
    curriculum = Curriculum(plan, journal, SEED, lambda ids: [rescored[ids]])
    visits: list[Visit] = []
    for step, ids in curriculum.steps():
        if step == stop:
            break
        loss = rng.gamma(4, 1, BATCH).astype(np.float32)
        loss[rng.random(BATCH) < 0.1] = np.nan
        curriculum.record(step, loss * SEQ, np.full(BATCH, SEQ, np.float32))
        phase = plan.at_step(step).index
        recorded = loss * np.float32(SEQ) / np.float32(SEQ)
        visits += [(int(b), step + 1, phase, float(x)) for b, x in zip(ids, recorded, strict=True) if b >= 0]
    curriculum.state_dict()
    return plan, curriculum, visits


def replayed(run: Run) -> list[Visit]:
    visits: list[Visit] = []
    for history in run.phases():
        losses = np.where(history.recorded, history.nll, np.nan).tolist()
        phase = history.planned.index
        rows = zip(history.block_ids.tolist(), (history.steps + 1).tolist(), losses, strict=True)
        visits += [(block, step, phase, loss) for block, step, loss in rows]
    return visits


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_replays_to_what_was_trained_on(tmp_path: Path, name: str) -> None:
    plan, curriculum, visits = train(tmp_path, SCHEDULES[name])
    run = open_run(tmp_path)
    assert run.plan == plan
    np.testing.assert_array_equal(np.array(replayed(run)), np.array(visits))
    ledger = run.empty_ledger()
    for history in run.phases(ledger):
        assert history.is_complete
    assert_same(ledger, curriculum.ledger)
    assert_same(run.ledger(), curriculum.ledger)


def assert_same(one: Ledger, other: Ledger) -> None:
    for field in ("nll", "step", "visits", "previous_nll", "previous_step"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    np.testing.assert_array_equal(one.references[0].moments, other.references[0].moments)
    np.testing.assert_array_equal(one.detrended_scores(), other.detrended_scores())


@pytest.mark.parametrize("stop", [0, 3, 8, 9, 20])
def test_a_run_that_was_killed_is_read_as_far_as_it_came(tmp_path: Path, stop: int) -> None:
    plan, curriculum, visits = train(tmp_path, SCHEDULES["lfr"], stop)
    path = curriculum.journal.path(curriculum.journal.phase)
    n_lost = 0
    if len(visits) > plan.phases[0].samples:  # the last writes: a torn entry, and a header that is behind
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 2)
        np.testing.assert_raises(ValueError, np.load, path)
        n_lost = 1
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    run = open_run(tmp_path)
    np.testing.assert_array_equal(np.array(replayed(run)), np.array(visits[: len(visits) - n_lost]))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Visit]]:
    folder = tmp_path_factory.mktemp("finished")
    _, _, visits = train(folder, SCHEDULES["lfr-clusters"])
    return open_run(folder), visits


def test_visits_of_blocks_and_steps_are_those_recorded(finished: tuple[Run, list[Visit]]) -> None:
    run, visits = finished
    for blocks in ([7], [3, 60, 0], []):
        expected = [visit for visit in visits if visit[0] in blocks]
        assert_visits(run.visits(np.array(blocks, np.int64)), expected)
    for step in (1, 8, 9, visits[-1][1]):
        expected = [visit for visit in visits if visit[1] == step]
        assert_visits(run.visits_at(step), expected)
    for step in (0, visits[-1][1] + 1):
        with pytest.raises(ValueError, match=f"step {step}: .*recorded steps: 1 to {visits[-1][1]}"):
            run.visits_at(step)


def assert_visits(visits: np.ndarray, expected: list[Visit]) -> None:
    np.testing.assert_array_equal(np.array(visits.tolist()), np.array(expected))


def test_the_loss_before_a_step(finished: tuple[Run, list[Visit]]) -> None:
    run, visits = finished
    ids = np.array([5, 9, 5, 60])
    for step in (1, 12, 20, 30):
        nll, at = run.last_before(ids, step)
        for block, loss, where in zip(ids, nll, at, strict=True):
            earlier = [v for v in visits if v[0] == block and v[1] < step and not np.isnan(v[3])]
            assert (where, loss) == (pytest.approx((earlier[-1][1], earlier[-1][3])) if earlier else (0, loss))
            assert np.isnan(loss) == (not earlier)


def test_means_of_steps_and_ranges(finished: tuple[Run, list[Visit]]) -> None:
    run, visits = finished
    for row in run.steps():
        losses = [v[3] for v in visits if v[1] == row["step"] and not np.isnan(v[3])]
        assert row["blocks"] == len(losses)
        assert row["nll"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert [row["step"] for row in run.steps()] == sorted({v[1] for v in visits})
    for row in run.phase_means(10, 30):
        inside = [v for v in visits if v[2] == row["phase"] and 10 <= v[0] < 30 and not np.isnan(v[3])]
        assert (row["visits"], row["blocks"]) == (len(inside), len({v[0] for v in inside}))
        assert row["nll"] == pytest.approx(np.mean([v[3] for v in inside]), abs=1e-6)


def test_a_phase_at_once_is_recorded_as_step_by_step(rng: np.random.Generator) -> None:
    for _ in range(20):
        n, size = int(rng.integers(1, 40)), int(rng.integers(1, 9))
        ids = rng.integers(0, 12, n).astype(np.uint32)
        nll = np.where(rng.random(n) < 0.3, -1, rng.gamma(4, 1, n)).astype(np.float32)
        one, other = Ledger(12, 60), Ledger(12, 60)
        for ledger in (one, other):
            ledger.visits[0] = 65534  # saturates
            ledger.record(3, np.arange(4, 12), np.linspace(1, 6, 8, dtype=np.float32))
            ledger.begin_phase(7, focus=bool(n % 2))
        for step, first in enumerate(range(0, n, size)):
            one.record(step + 7, ids[first : first + size], nll[first : first + size])
        other.record_phase(7, size, ids, nll)
        assert_same(one, other)


def test_an_order_that_was_not_trained_on_is_noticed(tmp_path: Path) -> None:
    train(tmp_path, SCHEDULES["lfr-v1"])
    event = {"event": "phase", "phase": 1, "order_hash": f"{7:016x}"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event) + '\n{"event": "tra')
    with pytest.raises(ValueError, match="phase 1 replays to another order"):
        open_run(tmp_path).ledger()


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no journal of a run here"):
        open_run(tmp_path)
    train(tmp_path, SCHEDULES["lfr-v1"])
    meta = tmp_path / "journal/meta.json"
    good = json.loads(meta.read_text())
    segment = good["segments"][0]
    for change, reason in (
        ({"segments": [segment | {"samples": [1]}]}, "expected a number for each of 4 phases"),
        ({"segments": [segment | {"blocks": "many"}]}, "blocks 'many': expected a positive number"),
        ({"segments": [segment | {"schedule": [{"kind": "nap", "duration": 1}]}]}, "choose from learn, focus, review"),
        (
            {"segments": [segment, segment | {"blocks": 5, "blend": {**segment["blend"], "starts": [0, 5]}}]},
            "the first corpora must be those of the segments before",
        ),
        ({"format": 3}, "format 3: this version of megatron_lfr reads format 2"),
    ):
        meta.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=reason):
            open_run(tmp_path)
    meta.write_text(json.dumps({key: value for key, value in good.items() if key != "seed"}))
    with pytest.raises(ValueError, match="'seed' is missing"):
        open_run(tmp_path)
    meta.write_text(json.dumps(good))
    path = tmp_path / "journal/phase_000.npy"
    content = path.read_bytes()
    for bad, reason in (
        (content[:-4] + b"\0\0\xc0\x7f", "not a loss"),
        (b"x" + content[1:], "not a phase of a journal"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=reason):
            open_run(tmp_path).ledger()
    path.write_bytes(content + content[-4:])
    with pytest.raises(ValueError, match="holds 62 losses, not 61"):
        open_run(tmp_path).ledger()
