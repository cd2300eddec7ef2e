"""The learning rate of every step against its definition, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron_lfr.engine.optimizer import LearningRate, OptimizerConfig, build_optimizer


def rates(steps: int, **settings: object) -> list[float]:
    schedule = LearningRate(OptimizerConfig(lr=1.0, **settings), steps, 4)  # type: ignore[arg-type]
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
        LearningRate(OptimizerConfig(lr_warmup_samples=88), 10, 8)
    with pytest.raises(ValueError, match="--lr-wsd-decay-samples 88: 11 steps, longer than the decay's 10 steps"):
        LearningRate(OptimizerConfig(lr_decay_style="WSD", lr_wsd_decay_samples=88), 10, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "--lr 0.0: must be positive"),
        ({"min_lr": 1.0}, "--min-lr 1.0: must lie between 0 and --lr"),
        ({"lr_warmup_iters": -1}, "--lr-warmup-iters -1"),
        ({"lr_warmup_iters": 3, "lr_warmup_fraction": 0.1}, "give one of"),
        ({"lr_warmup_fraction": 1.5}, "--lr-warmup-fraction 1.5"),
        ({"adam_beta2": 1.0}, "--adam-beta2 1.0: must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"lr_decay_iters": 3, "lr_decay_samples": 12}, "give one of --lr-decay-iters"),
        ({"lr_decay_iters": 0}, "--lr-decay-iters 0: must be at least 1"),
    ],
)
def test_bad_settings_name_their_flag(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings).validate()  # type: ignore[arg-type]


def test_norms_are_not_decayed() -> None:
    matrix, norm = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(OptimizerConfig(lr=0.1, weight_decay=0.5), [matrix, norm], [True, False])
    matrix.grad, norm.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert (matrix == 1 - 0.1 * 0.5).all()
    assert (norm == 1).all()
