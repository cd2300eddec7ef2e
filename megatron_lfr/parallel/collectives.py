"""Communication between ranks that share a computation, differentiable where a layer needs it.

A group of None, or of one rank, communicates nothing. Tokens are rows: gathering and scattering go along the first
dimension, in rank order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# The operators behind torch.distributed's functions: torch.compile sees through them.
_ops = torch.ops._c10d_functional


def group_size(group: ProcessGroup | None) -> int:
    """Return the number of ranks in `group`."""
    return 1 if group is None else group.size()


def group_rank(group: ProcessGroup | None) -> int:
    """Return this rank's number in `group`."""
    return 0 if group is None else group.rank()


def all_gather_rows(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Concatenate every rank's `tensor` [rows, ...]: [ranks · rows, ...]."""
    if group is None or group.size() == 1:
        return tensor
    return _done(_ops.all_gather_into_tensor(tensor.contiguous(), group.size(), group.group_name))


def all_gather_stacked(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Stack every rank's `tensor` [...] in rank order: [ranks, ...]."""
    return all_gather_rows(tensor, group).view(group_size(group), *tensor.shape)


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum over the ranks."""
    return start_all_reduce(tensor, group)()


def reduce_scatter_rows(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return this rank's rows of the sum over the ranks: [ranks · rows, ...] → [rows, ...]."""
    return start_reduce_scatter(tensor, group)()


def start_all_reduce(tensor: Tensor, group: ProcessGroup | None) -> Callable[[], Tensor]:
    """Begin all_reduce_sum; the returned function waits for the sum."""
    if group is None or group.size() == 1:
        return lambda: tensor
    started = _ops.all_reduce(tensor.contiguous(), "sum", group.group_name)
    return lambda: _done(started)


def start_reduce_scatter(tensor: Tensor, group: ProcessGroup | None) -> Callable[[], Tensor]:
    """Begin reduce_scatter_rows; the returned function waits for the rows."""
    if group is None or group.size() == 1:
        return lambda: tensor
    started = _ops.reduce_scatter_tensor(tensor.contiguous(), "sum", group.size(), group.group_name)
    return lambda: _done(started)


def _done(tensor: Tensor) -> Tensor:
    waited: Tensor = _ops.wait_tensor(tensor)
    return waited


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_rows(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_rows(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_rows(grad, ctx.group), None


def copy_to_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Pass `x`, equal on all ranks, to computations that differ by rank; its gradients are summed over the ranks."""
    return x if group_size(group) == 1 else _Copy.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_from_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum the ranks' `x`; each rank's gradient is that of the sum."""
    return x if group_size(group) == 1 else _Reduce.apply(x, group)  # type: ignore[no-untyped-call]


def gather_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Gather every rank's rows for computations that differ by rank; gradients are summed and scattered to the rows'
    ranks."""
    return x if group_size(group) == 1 else _Gather.apply(x, group)  # type: ignore[no-untyped-call]


def scatter_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return this rank's rows of the sum of the ranks' `x`; the gradients of all rows are gathered."""
    return x if group_size(group) == 1 else _ReduceScatter.apply(x, group)  # type: ignore[no-untyped-call]
