"""The ledger against dictionaries and the definition of its running mean."""

from __future__ import annotations

import numpy as np

from megatron_lfr.lfr import UNRECORDED, Ledger
from megatron_lfr.lfr.ledger import TREND_HORIZON


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


def test_detrended_scores_subtract_the_running_mean_of_the_step(rng: np.random.Generator) -> None:
    steps, ledger = 80, Ledger(n_blocks=400, total_steps=80)
    losses = rng.uniform(1, 8, (steps, 5)).astype(np.float32)
    for step in range(steps):
        ledger.record(step, np.arange(5) + 5 * step, losses[step])
    decay = 1 - 1 / TREND_HORIZON
    for step in range(steps):
        weights = decay ** np.arange(step, -1, -1.0)
        trend = (weights * losses[: step + 1].astype(np.float64).mean(1)).sum() / weights.sum()
        expected = losses[step] - trend
        np.testing.assert_allclose(ledger.detrended_scores()[5 * step : 5 * step + 5], expected, atol=1e-6)


def test_detrending_removes_the_age_of_a_score() -> None:
    """Blocks of equal difficulty, seen while the loss falls: raw scores rank by age, detrended ones do not."""
    ledger = Ledger(n_blocks=600, total_steps=300)
    for step in range(300):
        level = 8.0 - 0.02 * step
        ledger.record(step, np.array([2 * step, 2 * step + 1]), np.float32([level - 1, level + 1]))
    ages = np.arange(600) // 2
    raw = np.corrcoef(ages, ledger.recorded_scores())[0, 1]
    settled = slice(2 * 3 * TREND_HORIZON, None)  # the running mean lags by a constant after a few horizons
    detrended = np.corrcoef(ages[settled], ledger.detrended_scores()[settled])[0, 1]
    assert raw < -0.8
    assert abs(detrended) < 0.05


def test_a_step_without_a_loss_keeps_the_trend() -> None:
    ledger = Ledger(4, 3)
    ledger.record(0, np.array([0]), np.float32([UNRECORDED]))
    ledger.record(1, np.array([1]), np.float32([3.0]))
    ledger.record(2, np.array([2]), np.float32([UNRECORDED]))
    assert np.isnan(ledger.trend[0])
    assert ledger.trend[1:].tolist() == [3.0, 3.0]


def test_visits_saturate() -> None:
    ledger = Ledger(1, 1)
    ledger.visits[0] = 65534
    ledger.record(0, np.array([0, 0, 0]), np.float32([1, 1, 1]))
    assert ledger.visits[0] == 65535


def test_shuffled_scores_are_the_same_values_on_other_blocks(rng: np.random.Generator) -> None:
    ledger = Ledger(300, 1)
    seen = rng.permutation(300)[:200]
    ledger.record(0, seen, rng.uniform(0, 9, 200).astype(np.float32))
    shuffled = ledger.shuffled_scores(seed=1)
    np.testing.assert_array_equal(np.isnan(shuffled), np.isnan(ledger.nll))
    np.testing.assert_array_equal(np.sort(shuffled[seen]), np.sort(ledger.nll[seen]))
    assert abs(np.corrcoef(shuffled[seen], ledger.nll[seen])[0, 1]) < 0.25
    assert not np.array_equal(shuffled[seen], ledger.shuffled_scores(seed=2)[seen])
