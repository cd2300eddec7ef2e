"""Context parallelism: each rank computes some tokens of every sequence.

A sequence of S tokens is cut into 2n chunks for n ranks, and rank r takes chunks r and 2n−1−r, so that all ranks have
the same work under a causal mask (as in Llama 3, https://arxiv.org/abs/2407.21783, section 3.3.2). Keys and values of
all ranks are gathered before attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lfr.parallel.collectives import gather_rows, group_rank, group_size


def local_chunks(group: ProcessGroup | None) -> tuple[int, int]:
    """Return the indices of this rank's two chunks."""
    rank, ranks = group_rank(group), group_size(group)
    return rank, 2 * ranks - 1 - rank


def take_local(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Take this rank's tokens of every sequence: [B, S, ...] → [B, S / ranks, ...]."""
    if group_size(group) == 1:
        return tensor
    chunks = tensor.chunk(2 * group_size(group), 1)
    return torch.cat([chunks[i] for i in local_chunks(group)], 1)


def gather_sequence(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Gather whole sequences from the ranks' tokens: [B, S / ranks, ...] → [B, S, ...]. Gradients are summed."""
    ranks = group_size(group)
    rows = gather_rows(tensor.transpose(0, 1).contiguous(), group)  # in rank order: chunks 0, 2n−1, 1, 2n−2, ...
    chunks = rows.chunk(2 * ranks)
    in_order = [chunks[2 * i] if i < ranks else chunks[2 * (2 * ranks - 1 - i) + 1] for i in range(2 * ranks)]
    return torch.cat(in_order).transpose(0, 1)
