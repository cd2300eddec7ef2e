"""Linear layers and embeddings whose weight is spread over the ranks of a tensor-parallel group.

The scheme is that of Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053): a column-parallel layer
splits its outputs, the row-parallel layer after it its inputs, so that one sum over the ranks ends the pair. Weights
are held in fp32 and cast to the input's dtype where they are used; autograd then hands back fp32 gradients.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from megatron_lfr.parallel.collectives import copy_to_group, group_rank, group_size, reduce_from_group


def init_normal(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """The fp32 initial value of the whole parameter `name`: N(0, std²), a function of the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


class ShardedWeight(nn.Module):
    """A layer with one weight, of which this rank holds a slice along `shard_dim`.

    `full_shape` is the whole weight's true shape. The sharded dimension is padded with zeros to `padded_size`,
    which must be a multiple of the number of ranks; ValueError otherwise.
    """

    def __init__(
        self,
        full_shape: tuple[int, ...],
        shard_dim: int,
        group: ProcessGroup | None,
        padded_size: int | None = None,
    ) -> None:
        super().__init__()
        ranks = group_size(group)
        size = padded_size or full_shape[shard_dim]
        if size % ranks or size < full_shape[shard_dim]:
            raise ValueError(f"a weight of shape {full_shape} does not spread over {ranks} ranks (padded size {size})")
        self.full_shape, self.shard_dim, self.group = full_shape, shard_dim, group
        local_shape = list(full_shape)
        local_shape[shard_dim] = size // ranks
        self.weight = nn.Parameter(torch.zeros(local_shape, dtype=torch.float32))

    @torch.no_grad()
    def load_full(self, full: Tensor) -> None:
        """Take this rank's slice of the whole weight `full` [full_shape]; padding becomes zero."""
        if tuple(full.shape) != self.full_shape:
            raise ValueError(f"expected a weight of shape {self.full_shape}, got {tuple(full.shape)}")
        width = self.weight.shape[self.shard_dim]
        start = min(group_rank(self.group) * width, full.shape[self.shard_dim])
        part = full.narrow(self.shard_dim, start, min(width, full.shape[self.shard_dim] - start))
        self.weight.zero_().narrow(self.shard_dim, 0, part.shape[self.shard_dim]).copy_(part)

    def init_normal(self, name: str, seed: int, std: float) -> None:
        """Draw the initial weight: N(0, std²) from (seed, name), the same whole weight in every layout."""
        self.load_full(init_normal(name, self.full_shape, seed, std))


class ColumnParallelLinear(ShardedWeight):
    """y = x Wᵀ with the outputs spread over the ranks: [..., in_features] → [..., stack · out_features / ranks].

    With stack > 1, several layers of equal shape share one matrix product: the weight is [stack, out, in], sharded
    along `out`, so its global shape does not depend on the layout. The results stand side by side in the last
    dimension.
    """

    def __init__(self, in_features: int, out_features: int, group: ProcessGroup | None, stack: int = 1) -> None:
        shape = (out_features, in_features) if stack == 1 else (stack, out_features, in_features)
        super().__init__(shape, len(shape) - 2, group)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(copy_to_group(x, self.group), self.weight.flatten(0, -2).to(x.dtype))


class RowParallelLinear(ShardedWeight):
    """y = x Wᵀ with the inputs spread over the ranks: [..., in_features / ranks] → [..., out_features]."""

    def __init__(self, in_features: int, out_features: int, group: ProcessGroup | None) -> None:
        super().__init__((out_features, in_features), 1, group)

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_group(F.linear(x, self.weight.to(x.dtype)), self.group)


class VocabParallelEmbedding(ShardedWeight):
    """Rows of tokens, spread over the ranks and padded to `padded_size`: int64 [...] → fp32 [..., hidden]."""

    def __init__(self, num_embeddings: int, embedding_dim: int, group: ProcessGroup | None, padded_size: int) -> None:
        super().__init__((num_embeddings, embedding_dim), 0, group, padded_size)

    def forward(self, tokens: Tensor) -> Tensor:
        if group_size(self.group) == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - group_rank(self.group) * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_group(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)
