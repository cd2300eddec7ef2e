"""The ledger against dictionaries; tests/method tests the scores that it derives from losses."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lfr.lfr import UNRECORDED, Blend, Ledger, Phase, Schedule
from megatron_lfr.lfr import ledger as ledger_module


def test_ledger_matches_a_dictionary(rng: np.random.Generator) -> None:
    ledger = Ledger(n_blocks=20, total_steps=60)
    nll: dict[int, float] = {}
    step_of: dict[int, int] = {}
    visits = dict.fromkeys(range(20), 0)
    for step in range(60):
        ids = rng.integers(0, 15, 4)  # repeats within a step; blocks 15..19 stay unseen
        values = rng.uniform(0, 9, 4).astype(np.float32)
        values[rng.random(4) < 0.2] = UNRECORDED
        ledger.record(step, ids, values)
        for block, value in zip(ids.tolist(), values.tolist(), strict=True):
            if value != -1.0:
                nll[block], step_of[block] = value, step
                visits[block] += 1
    for block in range(20):
        assert ledger.visits[block] == visits[block]
        assert ledger.step[block] == step_of.get(block, -1)
        np.testing.assert_equal(ledger.nll[block], np.float32(nll.get(block, np.nan)))
    assert np.isnan(ledger.recorded_scores()[15:]).all()


def test_visits_saturate() -> None:
    ledger = Ledger(1, 1)
    ledger.visits[0] = 65534
    ledger.record(0, np.array([0, 0, 0]), np.float32([1, 1, 1]))
    assert ledger.visits[0] == 65535


def test_shuffled_scores_are_the_detrended_ones_on_other_blocks(rng: np.random.Generator) -> None:
    ledger = Ledger(300, 20)
    seen = rng.permutation(300)[:200]
    for step in range(20):
        ledger.record(step, seen[10 * step : 10 * step + 10], rng.uniform(0, 9 - step / 4, 10).astype(np.float32))
    detrended, shuffled = ledger.detrended_scores(), ledger.shuffled_scores(seed=1)
    np.testing.assert_array_equal(np.isnan(shuffled), np.isnan(ledger.nll))
    np.testing.assert_array_equal(np.sort(shuffled[seen]), np.sort(detrended[seen]))
    assert abs(np.corrcoef(shuffled[seen], detrended[seen])[0, 1]) < 0.25
    assert not np.array_equal(shuffled[seen], ledger.shuffled_scores(seed=2)[seen])


@pytest.mark.parametrize("sorted_at_a_time", [5, 1 << 22])
def test_improvement_is_the_fall_between_the_last_two_visits(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, sorted_at_a_time: int
) -> None:
    """Against all visits in lists, entered step by step and at once; blocks come again in later steps, in the same one,
    and not at all. The blocks of a second segment are measured against their own."""
    monkeypatch.setattr(ledger_module, "_SORTED", sorted_at_a_time)
    n, batch, blends = 40, 8, (Blend([0, 25]), Blend([0, 25, 40]))
    stepwise, at_once = (Ledger(n, 60, *blends, keep_previous=True) for _ in range(2))
    visits: dict[int, list[tuple[int, np.float32]]] = {block: [] for block in range(n)}
    for first, last in ((0, 30), (30, 60)):
        ids = rng.integers(0, 22 if first == 0 else 38, (last - first) * batch - 3)
        nll = rng.gamma(9, 0.5, len(ids)).astype(np.float32)
        nll[rng.random(len(ids)) < 0.1] = UNRECORDED
        for ledger in (stepwise, at_once):
            ledger.begin_phase(first, focus=first > 0, segment=first // 30)
        for step in range(first, last):
            part = slice((step - first) * batch, (step - first + 1) * batch)
            stepwise.record(step, ids[part], nll[part])
            for block, loss in zip(ids[part].tolist(), nll[part], strict=True):
                visits[block] += [(step, loss)] if loss != UNRECORDED else []
        at_once.record_phase(first, batch, ids, nll)
    for field in ("nll", "step", "visits", "previous_nll", "previous_step"):
        np.testing.assert_array_equal(getattr(stepwise, field), getattr(at_once, field))
    scores = stepwise.improvement_scores()
    np.testing.assert_array_equal(scores, at_once.improvement_scores())
    same_step = 0
    for block, seen in visits.items():
        if len(seen) < 2:
            assert np.isnan(scores[block])
            continue
        curves = stepwise.references[int(block >= 25)].curves()
        (before, earlier), (step, last) = seen[-2:]
        above = [(loss - curves.location[at]) / curves.spread[at] for at, loss in ((before, earlier), (step, last))]
        assert scores[block] == pytest.approx(curves.level[1] * (above[0] - above[1]), rel=1e-5, abs=1e-5)
        same_step += before == step
    assert same_step > 0
    assert {len(seen) for seen in visits.values()} >= {0, 1}


def test_only_runs_that_rank_by_improvement_pay_for_it() -> None:
    for score, size in (("detrended", 10), ("improvement", 18)):
        plan = Schedule((Phase("learn", 1.5), Phase("focus", 1, drop=0.5, score=score))).plan(30, 4, 8)
        ledger = Ledger.of(plan)
        arrays = (ledger.nll, ledger.step, ledger.visits, ledger.previous_nll, ledger.previous_step)
        assert sum(array.nbytes for array in arrays) == 30 * size == Ledger.bytes_of(plan)
