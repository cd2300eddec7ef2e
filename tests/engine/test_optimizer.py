"""Settings that are refused, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_lfr.engine.optimizer import OptimizerConfig, build_optimizer


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
        ({"lr_warmup_init": 1.0}, "--lr-warmup-init 1.0: must lie between 0 and --lr"),
        ({"lr_knee_explore": 1.0}, "--lr-knee-explore 1.0: must be at least 0 and below 1"),
        ({"lr_step_shares": [0.5]}, "--lr-step-shares: 1 of them, but 2 of --lr-step-factors"),
        ({"lr_step_shares": [0.9, 0.8]}, "--lr-step-shares 0.9 0.8: must ascend"),
        ({"lr_step_factors": [0.1, 0.3]}, "--lr-step-factors 0.1 0.3: must not ascend"),
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
