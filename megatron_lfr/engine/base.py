"""The protocol between the training loop and an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_lfr.data.loader import Batch


@dataclass(frozen=True)
class BlockLosses:
    """Per row of a batch: the summed negative log-likelihood (nats) and the tokens that it covers, fp32 [rows]."""

    nll_sum: npt.NDArray[np.float32]
    token_count: npt.NDArray[np.float32]


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step reports."""

    loss: float
    """Mean loss a valid token of the global batch (nats)."""
    blocks: BlockLosses
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    skipped: bool
    """Whether the weights were left alone because the loss or the gradient was not finite."""


class Engine(Protocol):
    """Trains a model one global batch at a time."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of training on one token, forward and backward."""
        ...

    def train_step(self, batch: Batch, lr: float) -> StepOutput:
        """Forward, backward and one optimizer step at learning rate `lr`."""
        ...

    def eval_step(self, batch: Batch) -> BlockLosses:
        """Losses of a batch under the present weights, without gradients."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training continues from, by name; loading a checkpoint writes into these."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The model's part of `tensors`."""
        ...
