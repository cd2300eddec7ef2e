"""Brings the losses of a global batch's blocks from the ranks that computed them to every rank's host."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine.base import BlockLosses
from megatron_lfr.model.decoder import Loss
from megatron_lfr.parallel import ParallelState


class HostCopy:
    """A tensor on its way to the host's memory. The host waits for it in `wait` and nowhere else.

    work: a collective that is still writing the tensor. Nothing may write to the tensor afterwards.
    """

    def __init__(self, tensor: Tensor, work: dist.Work | None = None) -> None:
        self._work, self._host = work, tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # On a separate stream: it does not wait for what is launched later, nor does that wait for the collective.
            stream = _copy_stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                if work is not None:
                    work.wait()  # the stream waits, not the host
                self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host.copy_(tensor, non_blocking=True)
                self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                self._event.record()
            tensor.record_stream(stream)
            self._work = None

    def wait(self) -> npt.NDArray[Any]:
        """Wait for the tensor and return its values. Raises where a rank that the collective needs is gone."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._event is not None:
            self._event.synchronize()  # without the interpreter's lock, which other threads need
        return self._host.numpy()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def reduce_losses(batch: Batch, losses: Sequence[Loss], parallel: ParallelState) -> HostCopy:
    """Sum the losses of a global batch's blocks over the ranks, [2, rows]: each rank gives the rows that it computed,
    and zeros for the others. The sum proceeds while the next step computes."""
    values = torch.zeros(2, len(batch.block_ids), device=parallel.device)
    if parallel.reports_losses:
        values[0, batch.rows] = torch.cat([part.nll_sum for part in losses])
        values[1, batch.rows] = torch.cat([part.count for part in losses])
    return HostCopy(values, dist.all_reduce(values, group=parallel.losses_group, async_op=True))


class LaunchedStep:
    """The losses of a step that has been launched.

    figures: fp64 [4]: the loss, the squared norm of the gradient before it is divided by the valid tokens, the factor
    that divides it, and 1 if the step is skipped.
    """

    def __init__(self, blocks: HostCopy, figures: Tensor) -> None:
        self._blocks, self._figures = blocks, HostCopy(figures)

    def wait(self) -> BlockLosses:
        return self._blocks.wait()

    @property
    def loss(self) -> float:
        return float(self._figures.wait()[0])

    @property
    def grad_norm(self) -> float:
        _, squares, correction, _ = self._figures.wait()
        # About one in a hundred of PyTorch's square roots in fp64 is not the nearest number.
        return math.sqrt(squares) * float(correction)

    @property
    def skipped(self) -> bool:
        return bool(self._figures.wait()[3])


def sum_losses(losses: Sequence[Loss], device: torch.device) -> Tensor:
    """Return the sum of the micro-batches' losses: a scalar, 0 on stages that compute none."""
    if not losses:
        return torch.zeros((), device=device)
    return torch.stack([part.loss.detach() for part in losses]).sum()
