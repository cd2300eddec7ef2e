"""The settings of optimizers; AdamW, and which parameters decay."""

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
    """The optimizer, with one learning-rate schedule over the entire run; phases do not warm it up again."""

    optimizer: Literal["adam", "lora-rite"] = "adam"
    """adam is AdamW. lora-rite (https://arxiv.org/abs/2410.20625), for the adapters of --lora-rank, takes steps that do
    not depend on how an adapter is factored; it needs --clip-grad 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay of all weights but those of norms."""
    adam_beta1: float = 0.9
    """Decay of the first moment, of AdamW and of LoRA-RITE."""
    adam_beta2: float = 0.999
    """Decay of the second moment, of AdamW and of LoRA-RITE."""
    adam_eps: float = 1e-8
    """Term added to AdamW's denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    adam_kernel: Literal["torch", "apex"] = "torch"
    """What computes AdamW: PyTorch's fused kernel, or apex's FusedAdam, which needs a GPU."""
    rite_clip: float = 1.0
    """With --optimizer lora-rite: largest global norm of the unmagnified gradients (those that do not depend on how an
    adapter is factored), in place of --clip-grad; 0 turns clipping off."""
    rite_escape: bool = True
    """With --optimizer lora-rite: remember what the second moment loses where an adapter's columns turn, as a bound
    that keeps steps in new directions small."""
    rite_eps: float = 1e-6
    """With --optimizer lora-rite: term added to the roots of the second moment's eigenvalues."""
    rite_relative_eps: bool = False
    """With --optimizer lora-rite: take --rite-eps as a share of the largest such root of each factor."""

    def validate(self) -> None:
        check_package("--adam-kernel", self.adam_kernel)
        super().validate()
        if self.weight_decay < 0 or self.clip_grad < 0 or self.adam_eps <= 0:
            raise ValueError("--weight-decay and --clip-grad must not be negative, --adam-eps must be positive")
        if self.rite_clip < 0 or self.rite_eps <= 0:
            raise ValueError("--rite-clip must not be negative, --rite-eps must be positive")
        if self.optimizer == "lora-rite" and self.clip_grad:
            raise ValueError(
                f"--clip-grad {self.clip_grad:g}: must be 0 with --optimizer lora-rite, whose steps would depend on "
                "how an adapter is factored; --rite-clip is the bound that does not"
            )
        if self.optimizer == "lora-rite" and self.adam_kernel != "torch":
            raise ValueError(f"--adam-kernel {self.adam_kernel}: computes AdamW, not --optimizer lora-rite")
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
