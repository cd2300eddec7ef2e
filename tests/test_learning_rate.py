"""The learning rate of every step against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_lfr.learning_rate import LearningRate, LearningRateConfig, first_difference


def rates(steps: int, **settings: Any) -> list[float]:
    schedule = LearningRate(LearningRateConfig(lr=1.0, **settings), steps, 4)
    return [schedule(step) for step in range(steps)]


def test_warmup_rises_linearly_and_the_first_step_moves() -> None:
    assert rates(10, lr_warmup_iters=4, lr_decay_style="constant") == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert rates(10, lr_warmup_samples=16, lr_decay_style="constant") == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert rates(10, lr_warmup_fraction=0.4, lr_decay_style="constant") == [0.25, 0.5, 0.75, *[1.0] * 7]


def test_cosine_and_linear_end_at_min_lr() -> None:
    cosine = rates(12, lr_warmup_iters=2, min_lr=0.1, lr_decay_style="cosine")
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(1, 11)]
    assert cosine[2:] == pytest.approx(expected)
    linear = rates(12, lr_warmup_iters=2, min_lr=0.1, lr_decay_style="linear")
    assert linear[2:] == pytest.approx([1 - 0.09 * k for k in range(1, 11)])
    assert cosine[-1] == pytest.approx(0.1)


def test_decay_iters_end_before_the_run() -> None:
    assert rates(10, lr_decay_iters=5, lr_decay_style="linear")[4:] == pytest.approx([0.0] * 6)
    assert rates(10, lr_decay_samples=20, lr_decay_style="linear")[4:] == pytest.approx([0.0] * 6)
    # 18 samples are four and a half steps of 4.
    assert rates(10, lr_decay_samples=18, lr_decay_style="linear")[3:5] == pytest.approx([0.5 / 4.5, 0.0])


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("linear", [1 - 0.9 * k / 4 for k in range(1, 5)]),
        ("cosine", [0.1 + 0.45 * (1 + math.cos(math.pi * k / 4)) for k in range(1, 5)]),
        ("exponential", [0.1 + 0.9 * (2 * 0.5 ** (k / 4) - 1) for k in range(1, 5)]),
        ("minus_sqrt", [0.1 + 0.9 * (1 - math.sqrt(k / 4)) for k in range(1, 5)]),
    ],
)
def test_wsd_stays_then_decays(style: str, expected: list[float]) -> None:
    values = rates(
        20,
        lr_decay_style="WSD",
        lr_warmup_iters=2,
        lr_wsd_decay_iters=4,
        lr_wsd_decay_style=style,
        min_lr=0.1,
    )
    assert values[1:16] == [1.0] * 15
    assert values[16:] == pytest.approx(expected)


def test_schedules_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="--lr-warmup-iters 11: longer than the decay's 10 steps"):
        rates(10, lr_warmup_iters=11)
    with pytest.raises(ValueError, match="--lr-wsd-decay-iters 9: longer than the decay's 10 steps less 2"):
        rates(10, lr_decay_style="WSD", lr_warmup_iters=2, lr_wsd_decay_iters=9)
    with pytest.raises(ValueError, match="--lr-warmup-samples 88: 11 steps, longer than the decay's 10 steps"):
        LearningRate(LearningRateConfig(lr_warmup_samples=88), 10, 8)
    with pytest.raises(ValueError, match="--lr-wsd-decay-samples 88: 11 steps, longer than the decay's 10 steps"):
        LearningRate(LearningRateConfig(lr_decay_style="WSD", lr_wsd_decay_samples=88), 10, 8)


def test_a_warmup_starts_from_its_own_rate() -> None:
    values = rates(10, lr_warmup_iters=4, lr_warmup_init=0.2, lr_decay_style="constant")
    assert values == pytest.approx([0.4, 0.6, 0.8, *[1.0] * 7])


def test_a_knee_explores_then_falls_on_a_line() -> None:
    """Two steps of warm-up, four at the peak, four that fall."""
    values = rates(10, lr_warmup_iters=2, lr_decay_style="knee", min_lr=0.2)
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    values = rates(10, lr_decay_style="knee", lr_knee_explore=0.9)
    assert values == pytest.approx([*[1.0] * 9, 0.0])


def test_multi_step_falls_after_shares_of_the_steps() -> None:
    """DeepSeek's shares and factors, unless others are given."""
    assert rates(20, lr_decay_style="multi-step") == [*[1.0] * 16, 0.316, 0.316, 0.1, 0.1]
    given = {"lr_step_shares": [0.5, 0.7], "lr_step_factors": [0.5, 0.0], "min_lr": 0.01}
    assert rates(10, lr_decay_style="multi-step", **given) == [*[1.0] * 5, 0.5, 0.5, 0.01, 0.01, 0.01]
    at_the_end = {"lr_wsd_decay_style": "multi-step", "lr_wsd_decay_iters": 10}
    assert rates(15, lr_decay_style="WSD", **at_the_end) == [*[1.0] * 13, 0.316, 0.1]


def test_the_inverse_square_root_needs_no_length() -> None:
    expected = [0.25, 0.5, 0.75, *(max(0.6, math.sqrt(4 / k)) for k in range(4, 17))]
    for steps in (10, 16):
        values = rates(steps, lr_warmup_iters=4, lr_decay_style="inverse-square-root", min_lr=0.6)
        assert values == pytest.approx(expected[:steps])


def test_the_past_differs_where_the_rate_follows_the_length() -> None:
    def rate(steps: int, **settings: Any) -> LearningRate:
        return LearningRate(LearningRateConfig(**settings), steps, 4)

    assert first_difference(rate(10, lr_warmup_iters=3), rate(20, lr_warmup_iters=3), 10) == 3
    assert first_difference(rate(10, lr_warmup_iters=3), rate(20, lr_warmup_iters=3), 3) is None
    constant = {"lr_decay_style": "constant", "lr_warmup_iters": 3}
    assert first_difference(rate(10, **constant), rate(20, **constant), 10) is None
