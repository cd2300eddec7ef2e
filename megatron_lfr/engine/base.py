"""The protocols of engines, by which training and evaluation use them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.parallel import ParallelState

BlockLosses = npt.NDArray[np.float32]
"""[2, rows]: for each block of a global batch, its summed negative log-likelihood (nats), and the number of tokens in
that sum."""


class PendingLosses(Protocol):
    """The losses of a batch, which GPUs may still be computing, on their way to all ranks."""

    def wait(self) -> BlockLosses:
        """Wait for the losses and return all of them, on every rank. Raises where another rank is gone."""
        ...


class StepLosses(PendingLosses, Protocol):
    """The losses of an optimizer step, the same on every rank. Reading a property waits for them, too."""

    @property
    def loss(self) -> float:
        """Mean loss per valid token of the global batch (nats), with z-loss and label smoothing."""
        ...

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the gradient before clipping."""
        ...

    @property
    def skipped(self) -> bool:
        """Whether the weights stayed as they were because the loss or the gradient was not finite."""
        ...


class Evaluator(Protocol):
    """Computes the losses of blocks. All ranks call each method together."""

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary: token ids are below this."""
        ...

    @property
    def eval_rows(self) -> int:
        """Number of rows that `eval_step` takes, over all ranks."""
        ...

    def eval_step(self, batch: Batch) -> PendingLosses:
        """Compute the losses of a batch with the present weights, without gradients. Does not wait for a GPU."""
        ...


class Engine(Evaluator, Protocol):
    """Trains a model one global batch at a time. All ranks call each method together."""

    @property
    def parallel(self) -> ParallelState:
        """The ranks that it runs on, and the place of this one among them."""
        ...

    def flops_per_token(self, seq_length: int) -> float:
        """Return the floating-point operations of training on one token, forward and backward."""
        ...

    def train_step(self, batch: Batch, lr: float) -> StepLosses:
        """Compute forward, backward and one optimizer step at learning rate `lr`. The host does not wait for a GPU:
        whether the step is skipped is decided on the GPU, and the host knows it once it waits for the result."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that training continues from, by name. A checkpoint is loaded by writing into these."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors that are weights of the model, by name: a part of `tensors`. Where adapters are trained,
        these are the adapters."""
        ...

    def base_weights(self) -> dict[str, Tensor]:
        """Return the weights that stay as they are while adapters are trained, by name; {} without adapters. They may
        be bf16, where the model computes in it."""
        ...

    def loaded(self) -> None:
        """Must be called after something was written into `tensors`, `weights` or `base_weights`, before the next
        computation: an engine may compute with copies of them."""
        ...
