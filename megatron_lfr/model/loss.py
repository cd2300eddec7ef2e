"""Settings of the loss: what training may add to the cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossConfig:
    """The loss that training minimises. The recorded losses of blocks, and every evaluation, are the plain
    cross-entropy."""

    z_loss_coeff: float = 0.0
    """Weight of the z-loss, the squared logarithm of each token's softmax denominator, which keeps the logits from
    drifting; PaLM has 1e-4 (https://arxiv.org/abs/2204.02311). Only the loss that training minimises contains it."""
    label_smoothing: float = 0.0
    """Share of each token's target that is spread evenly over the vocabulary. Only the loss that training minimises is
    smoothed."""

    def validate(self) -> None:
        """Check the ranges; ValueError names the flag and the legal values."""
        for flag, value in (("--z-loss-coeff", self.z_loss_coeff), ("--label-smoothing", self.label_smoothing)):
            if not 0 <= value < 1:
                raise ValueError(f"{flag} {value}: must be at least 0 and below 1")
