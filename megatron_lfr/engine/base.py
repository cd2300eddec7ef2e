"""The protocol between the training loop and an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.parallel import ParallelState


@dataclass(frozen=True)
class BlockLosses:
    """Per row of a global batch: the summed negative log-likelihood (nats) and its number of tokens, fp32 [rows]."""

    nll_sum: npt.NDArray[np.float32]
    token_count: npt.NDArray[np.float32]


class PendingLosses(Protocol):
    """The block losses of a batch, on their way from the ranks that computed them."""

    def wait(self) -> BlockLosses:
        """All of them, on every rank. Raises where another rank is gone."""
        ...


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step reports, the same on every rank."""

    loss: float
    """Mean loss a valid token of the global batch (nats), z-loss and label smoothing included."""
    blocks: BlockLosses
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    skipped: bool
    """Whether the weights were left alone because the loss or the gradient was not finite."""


class PendingStep(Protocol):
    """An optimizer step that a GPU may still be computing."""

    def wait(self) -> StepOutput:
        """What it gave. Raises where another rank is gone."""
        ...


class Evaluator(Protocol):
    """Computes the losses of blocks. All ranks call each method together."""

    @property
    def parallel(self) -> ParallelState:
        """The ranks that it runs on, and where this one stands among them."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def eval_rows(self) -> int:
        """Rows that `eval_step` takes, over all ranks."""
        ...

    def eval_step(self, batch: Batch) -> PendingLosses:
        """Losses of a batch under the present weights, without gradients. A GPU may still be computing them."""
        ...


class Engine(Evaluator, Protocol):
    """Trains a model one global batch at a time. All ranks call each method together."""

    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of training on one token, forward and backward."""
        ...

    def train_step(self, batch: Batch, lr: float) -> PendingStep:
        """Forward, backward and one optimizer step at learning rate `lr`. The host waits for no GPU in it: whether the
        step counts is decided where it is computed, and known to the host once it waits for what is returned."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training continues from, by name. Loading a checkpoint writes into these and calls `loaded`."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The model's part of `tensors`."""
        ...

    def loaded(self) -> None:
        """To be called when something has been written into `tensors` or `weights`, before the next computation: an
        engine may compute with other copies."""
        ...
