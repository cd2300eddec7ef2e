"""The losses of a global batch's blocks, from the ranks that computed them to all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine.base import BlockLosses
from megatron_lfr.model.llama import Loss
from megatron_lfr.parallel import ParallelState


class ReducedLosses:
    """A zero-filled [2, rows] (sums, token counts) into which each rank writes the rows it computed; their sum is under
    way when this is made, while the next step computes."""

    def __init__(self, batch: Batch, losses: Sequence[Loss], parallel: ParallelState) -> None:
        self._values = torch.zeros(2, len(batch.block_ids), device=parallel.device)
        if parallel.reports_losses:
            self._values[0, batch.rows] = torch.cat([part.nll_sum for part in losses])
            self._values[1, batch.rows] = torch.cat([part.count for part in losses])
        self._work = dist.all_reduce(self._values, group=parallel.losses_group, async_op=True)

    def wait(self) -> BlockLosses:
        # On a stream of its own, a GPU's host does not wait for what was launched since.
        stream = torch.cuda.Stream(self._values.device) if self._values.is_cuda else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            if self._work is not None:
                self._work.wait()
                self._work = None
            if stream is not None:
                stream.synchronize()  # copying would wait as well, and hold the interpreter's lock
            nll_sum, count = self._values.numpy(force=True)
        return BlockLosses(nll_sum, count)


def sum_losses(losses: Sequence[Loss], device: torch.device) -> Tensor:
    """The micro-batches' losses together: a scalar, 0 on stages that compute none."""
    if not losses:
        return torch.zeros((), device=device)
    return torch.stack([part.loss.detach() for part in losses]).sum()
