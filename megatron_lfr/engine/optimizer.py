"""AdamW: its settings, and which parameters decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from megatron_lfr.learning_rate import LearningRateConfig
from megatron_lfr.model.fused import check_package


@dataclass(frozen=True)
class OptimizerConfig(LearningRateConfig):
    """AdamW with one learning-rate schedule over the entire run; phases do not warm it up again."""

    weight_decay: float = 0.01
    """Decoupled weight decay of all weights but those of norms."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_eps: float = 1e-8
    """Term added to AdamW's denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    adam_kernel: Literal["torch", "apex"] = "torch"
    """What computes AdamW: PyTorch's fused kernel, or apex's FusedAdam, which needs a GPU."""

    def validate(self) -> None:
        check_package("--adam-kernel", self.adam_kernel)
        super().validate()
        if self.weight_decay < 0 or self.clip_grad < 0 or self.adam_eps <= 0:
            raise ValueError("--weight-decay and --clip-grad must not be negative, --adam-eps must be positive")
        for flag, beta in (("--adam-beta1", self.adam_beta1), ("--adam-beta2", self.adam_beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{flag} {beta}: must be at least 0 and below 1")


def build_optimizer(
    config: OptimizerConfig, parameters: Sequence[nn.Parameter], decayed: Sequence[bool]
) -> torch.optim.Optimizer:
    """Build AdamW with weight decay on the `decayed` parameters: matrices, but not the weights of norms."""
    marked = list(zip(parameters, decayed, strict=True))
    groups = [
        {"params": [p for p, decays in marked if decays], "weight_decay": config.weight_decay},
        {"params": [p for p, decays in marked if not decays], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    if config.adam_kernel == "apex":
        from megatron_lfr.engine.apex_adam import ApexAdamW

        return ApexAdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)
