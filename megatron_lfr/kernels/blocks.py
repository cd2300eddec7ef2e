"""Sums over the blocks of a micro-batch: deterministic on any device, and the host does not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_blocks(
    values: Tensor, shape: torch.Size, block_ids: Tensor | None, num_blocks: int | None
) -> tuple[Tensor, Tensor]:
    """Sum each row of `values` [2, B·S] over each block, in fp64; return two sums [blocks] in their dtype.

    A block is a row of `shape` (B, S), unless `block_ids` [B, S] below `num_blocks` assigns each token to one. Raises
    ValueError where these do not fit together; the ids themselves are checked on a CPU only.
    """
    dtype, values = values.dtype, values.double()
    if block_ids is None:
        if num_blocks is not None:
            raise ValueError("num_blocks: goes with block_ids only")
        sums = values.view(2, *shape).sum(2)
    else:
        order, offsets = _segments(shape, block_ids, num_blocks)
        sums = torch.segment_reduce(
            values[:, order], "sum", offsets=offsets.expand(2, -1).contiguous(), axis=1, unsafe=True, initial=0.0
        )
    one, other = sums.to(dtype)
    return one, other


def _segments(shape: torch.Size, block_ids: Tensor, num_blocks: int | None) -> tuple[Tensor, Tensor]:
    """Return (order of the tokens that makes each block contiguous, offsets of the blocks in it [blocks + 1])."""
    if num_blocks is None or num_blocks < 1:
        raise ValueError("block_ids: give num_blocks, at least 1")
    if block_ids.shape != shape or block_ids.dtype != torch.int64:
        raise ValueError(f"block_ids: expected int64 {tuple(shape)}, got {block_ids.dtype} {tuple(block_ids.shape)}")
    if block_ids.is_cpu and bool(((block_ids < 0) | (block_ids >= num_blocks)).any()):
        raise ValueError(f"block_ids: must lie in [0, {num_blocks})")
    ordered, order = block_ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(num_blocks + 1, device=block_ids.device)
    return order, torch.searchsorted(ordered, bounds)
