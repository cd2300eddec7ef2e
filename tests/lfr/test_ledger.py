"""The ledger against dictionaries; tests/method tests the scores that it derives from losses."""

from __future__ import annotations

import numpy as np

from megatron_lfr.lfr import UNRECORDED, Ledger


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
