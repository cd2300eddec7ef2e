"""Communication between tensor-parallel ranks, differentiable where a layer needs it.

A group of None, or of one rank, communicates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks in `group`."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    """This rank's number in `group`."""
    return 0 if group is None else dist.get_rank(group)


def all_gather_stacked(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """`tensor` [...] of every rank, in rank order: [ranks, ...]."""
    n = group_size(group)
    if n == 1:
        return tensor.unsqueeze(0)
    # Gloo accepts the ranks' parts one after the other along the first dimension only.
    gathered = tensor.new_empty(n * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered.view(n, *tensor.shape)


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the ranks, written over `tensor` (contiguous)."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce_sum(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`x`, equal on all ranks, into computations that differ by rank: the gradients are summed over the ranks."""
    return x if group_size(group) == 1 else _Copy.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_from_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of the ranks' `x`; each rank's gradient is the sum's."""
    return x if group_size(group) == 1 else _Reduce.apply(x, group)  # type: ignore[no-untyped-call]
