"""AdamW and the learning-rate schedule over the whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from megatron_lfr.model.fused import check_package


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with one learning-rate schedule over the entire run; phases do not warm it up again."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the learning rate's decay. WSD (warm-up, stable, decay) holds the peak and decays at the end."""
    lr_decay_iters: int | None = None
    """Steps until the decay is complete; by default the run's total."""
    lr_decay_samples: int | None = None
    """Samples (visits of blocks) until the decay is complete, instead of --lr-decay-iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0."""
    lr_warmup_samples: int = 0
    """Samples (visits of blocks) of linear warm-up from 0, instead of --lr-warmup-iters."""
    lr_warmup_fraction: float | None = None
    """Length of the linear warm-up from 0 as a share of the decay's steps, instead of --lr-warmup-iters."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    """Shape of the decay at the end of --lr-decay-style WSD."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the decay at the end of --lr-decay-style WSD; by default a tenth of the run."""
    lr_wsd_decay_samples: int | None = None
    """Samples (visits of blocks) of the decay at the end of --lr-decay-style WSD, instead of --lr-wsd-decay-iters."""
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
        if self.lr <= 0:
            raise ValueError(f"--lr {self.lr}: must be positive")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"--min-lr {self.min_lr}: must lie between 0 and --lr {self.lr}")
        for flag, length in (
            ("--lr-warmup-iters", self.lr_warmup_iters),
            ("--lr-warmup-samples", self.lr_warmup_samples),
        ):
            if length < 0:
                raise ValueError(f"{flag} {length}: must not be negative")
        for flag, decay in (
            ("--lr-decay-iters", self.lr_decay_iters),
            ("--lr-decay-samples", self.lr_decay_samples),
            ("--lr-wsd-decay-iters", self.lr_wsd_decay_iters),
            ("--lr-wsd-decay-samples", self.lr_wsd_decay_samples),
        ):
            if decay is not None and decay < 1:
                raise ValueError(f"{flag} {decay}: must be at least 1")
        if sum(map(bool, (self.lr_warmup_iters, self.lr_warmup_samples, self.lr_warmup_fraction))) > 1:
            raise ValueError("give one of --lr-warmup-iters, --lr-warmup-samples and --lr-warmup-fraction")
        if self.lr_decay_iters and self.lr_decay_samples:
            raise ValueError("give one of --lr-decay-iters and --lr-decay-samples")
        if self.lr_wsd_decay_iters and self.lr_wsd_decay_samples:
            raise ValueError("give one of --lr-wsd-decay-iters and --lr-wsd-decay-samples")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction <= 1:
            raise ValueError(f"--lr-warmup-fraction {self.lr_warmup_fraction}: must lie between 0 and 1")
        if self.weight_decay < 0 or self.clip_grad < 0 or self.adam_eps <= 0:
            raise ValueError("--weight-decay and --clip-grad must not be negative, --adam-eps must be positive")
        for flag, beta in (("--adam-beta1", self.adam_beta1), ("--adam-beta2", self.adam_beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{flag} {beta}: must be at least 0 and below 1")


class LearningRate:
    """Gives the learning rate of each step: linear warm-up from 0 to `lr`, then `lr_decay_style` down to `min_lr`.

    Step k (from 0) of a warm-up of w steps has lr·(k+1)/w, so that the first step already moves and the last step of
    the decay is at `min_lr` (Megatron-LM is one step behind). Skipped steps count, while Megatron-LM would not
    advance the rate. Lengths in samples may be fractions of a step. ValueError where warm-up and decay do not fit.
    """

    def __init__(self, config: OptimizerConfig, total_steps: int, global_batch_size: int) -> None:
        self.config = config
        self.decay_steps: float = config.lr_decay_iters or total_steps
        if config.lr_decay_samples:
            self.decay_steps = config.lr_decay_samples / global_batch_size
        self.warmup: float = config.lr_warmup_iters or config.lr_warmup_samples / global_batch_size
        if config.lr_warmup_fraction:
            self.warmup = config.lr_warmup_fraction * self.decay_steps
        if self.warmup > self.decay_steps:
            samples = config.lr_warmup_samples
            given = f"samples {samples}: {self.warmup:g} steps, " if samples else f"iters {config.lr_warmup_iters}: "
            raise ValueError(f"--lr-warmup-{given}longer than the decay's {self.decay_steps:g} steps")
        self.span = self.decay_steps - self.warmup
        self.style: str = config.lr_decay_style
        if config.lr_decay_style == "WSD":
            length: float = config.lr_wsd_decay_iters or max(1.0, self.decay_steps // 10)
            if config.lr_wsd_decay_samples:
                length = config.lr_wsd_decay_samples / global_batch_size
            if length > self.span:
                blocks = config.lr_wsd_decay_samples
                given = f"samples {blocks}: {length:g} steps, " if blocks else f"iters {length:g}: "
                raise ValueError(
                    f"--lr-wsd-decay-{given}longer than the decay's {self.decay_steps:g} steps less "
                    f"{self.warmup:g} of warm-up"
                )
            self.span, self.style = length, config.lr_wsd_decay_style

    def __call__(self, step: int) -> float:
        config, done = self.config, step + 1
        if done < self.warmup:
            return config.lr * done / self.warmup
        if self.style == "constant":
            return config.lr
        progress = 1.0 - (self.decay_steps - done) / self.span if self.span else 1.0
        remaining = _remaining(self.style, min(max(progress, 0.0), 1.0))
        return config.min_lr + (config.lr - config.min_lr) * remaining


def _remaining(style: str, progress: float) -> float:
    """Return the share of the way from `lr` to `min_lr` that is left: 1 at progress 0, 0 at progress 1. The formulas
    are Megatron-LM's."""
    match style:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "exponential":
            return 2.0 * math.pow(0.5, progress) - 1.0
        case _:  # minus_sqrt
            return 1.0 - math.sqrt(progress)


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
