"""The protocol between the training loop and an engine."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.parallel import ParallelState

BlockLosses = npt.NDArray[np.float32]
"""Of the blocks of a global batch: the summed negative log-likelihood (nats) of each, and the number of tokens that it
covers, [2, rows]."""


class PendingLosses(Protocol):
    """The losses of a batch, which a GPU may still be computing, on their way from the ranks that do."""

    def wait(self) -> BlockLosses:
        """All of them, on every rank. Raises where another rank is gone."""
        ...


class StepLosses(PendingLosses, Protocol):
    """The losses of an optimizer step; to read one of its figures waits for them, too. The same on every rank."""

    @property
    def loss(self) -> float:
        """Mean loss a valid token of the global batch (nats), z-loss and label smoothing included."""
        ...

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the gradient before clipping."""
        ...

    @property
    def skipped(self) -> bool:
        """Whether the weights were left alone because the loss or the gradient was not finite."""
        ...


class Evaluator(Protocol):
    """Computes the losses of blocks. All ranks call each method together."""

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

    @property
    def parallel(self) -> ParallelState:
        """The ranks that it runs on, and where this one stands among them."""
        ...

    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of training on one token, forward and backward."""
        ...

    def train_step(self, batch: Batch, lr: float) -> StepLosses:
        """Forward, backward and one optimizer step at learning rate `lr`. The host waits for no GPU in it: whether the
        step counts is decided where it is computed, and known to the host once it waits for what is returned."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training continues from, by name. To load a checkpoint is to write into these."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The model's part of `tensors`."""
        ...

    def loaded(self) -> None:
        """To be called when something has been written into `tensors` or `weights`, before the next computation: an
        engine may compute with other copies."""
        ...
