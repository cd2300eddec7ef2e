"""Prepares gradients for the optimizer after the backward pass, over every mesh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lfr.engine.sharding import ShardedParameter
from megatron_lfr.model.decoder import Decoder
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.mesh import make_subgroup


class Gradients:
    """The gradients of this rank's parts of the weights that are trained."""

    def __init__(
        self, stages: Sequence[Decoder], parameters: Sequence[ShardedParameter], parallel: ParallelState
    ) -> None:
        self._parameters = parameters
        self._tensor_group = parallel.tensor_group
        self._counted = [p for p in parameters if p.is_first_copy]
        self._partial = [p for p in parameters if p.has_partial_gradient]
        self._tied_group = _make_tied_group(stages, parallel)
        self._tied = [p for p in parameters if p.name == "embedding.weight"] if self._tied_group else []

    def finish(self) -> None:
        """Sum the gradients of which ranks hold parts after the backward pass: over the tensor-parallel ranks those of
        norms under sequence parallelism, and those of the factors of adapters that every rank holds; over the first and
        last pipeline stage those of tied embeddings."""
        if self._partial:
            grads = [p.local_grad() for p in self._partial]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, group=self._tensor_group)
            parts = torch.split(flat, [grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
        for parameter in self._tied:
            dist.all_reduce(parameter.local_grad(), group=self._tied_group)

    def local_square_sum(self) -> Tensor:
        """Return this rank's part of the squared L2 norm, fp64. Summed over all ranks, every element counts once."""
        if not self._counted:
            return torch.zeros((), dtype=torch.float64, device=self._parameters[0].local().device)
        norms = torch._foreach_norm([p.local_grad() for p in self._counted])
        return torch.stack(list(norms)).double().square().sum()

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients by a scalar, rounded to fp32. AdamW's grad_scale would divide by its reciprocal, which
        rounds once more."""
        torch._foreach_mul_([p.local_grad() for p in self._parameters], factor.float())


def _make_tied_group(stages: Sequence[Decoder], parallel: ParallelState) -> ProcessGroup | None:
    """Group the ranks of the first and last stage that hold the same part of the embedding; None for one stage."""
    config, count = stages[0].config, parallel.mesh["pipeline"].size()
    if count == 1 or config.untie_embeddings_and_output_weights:
        return None
    ranks = parallel.mesh.mesh.flatten(1)  # [pipeline ranks, ranks of a stage]
    return make_subgroup(torch.stack((ranks[0], ranks[-1]), 1), parallel.timeout)
