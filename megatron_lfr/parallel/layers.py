"""Linear layers and embeddings whose weight is spread over the ranks of a tensor-parallel group.

The scheme is that of Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053): a column-parallel layer
splits its outputs, the row-parallel layer after it its inputs, so that one sum over the ranks ends the pair. With
sequence parallelism (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198), what lies between the pairs is split
by tokens. Weights are cast to the input's dtype where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from megatron_lfr.parallel.collectives import (
    copy_to_group,
    gather_rows,
    group_rank,
    group_size,
    reduce_from_group,
    scatter_sum,
)
from megatron_lfr.parallel.counter_random import fill_normal


@dataclass(frozen=True)
class TensorParallel:
    """A tensor-parallel group (None: one rank), and whether its ranks split the tokens between the layers."""

    group: ProcessGroup | None = None
    sequence: bool = False

    @property
    def size(self) -> int:
        return group_size(self.group)

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    def enter(self, x: Tensor) -> Tensor:
        """Give every rank all tokens, [N or N / ranks, ...] → [N, ...], before layers that each rank computes a part
        of."""
        return gather_rows(x, self.group) if self.sequence else copy_to_group(x, self.group)

    def take_local(self, x: Tensor) -> Tensor:
        """Take this rank's tokens between the layers, as `leave` returns them: [N, ...] → [N or N / ranks, ...]."""
        return x.chunk(self.size)[self.rank] if self.sequence else x

    def share(self, weight: Tensor) -> Tensor:
        """Use a weight, equal on all ranks, in computations that differ by rank: its gradients are summed.

        With `sequence`, this happens after the backward, together with those of all weights that ranks have copies of.
        """
        return weight if self.sequence else copy_to_group(weight, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Sum what the ranks computed for all tokens: [N, ...] → [N or N / ranks, ...]."""
        return scatter_sum(x, self.group) if self.sequence else reduce_from_group(x, self.group)


class ShardedWeight(nn.Module):
    """A layer with one matrix, of which this rank holds a slice along `shard_dim` (None: all of it), and, if asked, a
    bias for each of its rows, which is sliced as these are; their values are undefined at first.

    `full_shape` is the shape of the weight over all ranks, without padding. The sharded dimension is padded with zeros
    to `padded_size`, which must be a multiple of the number of ranks; ValueError otherwise.
    """

    bias: nn.Parameter | None
    lora: nn.Module | None
    """What adds to a linear layer's outputs: see parallel/lora.py."""
    has_partial_gradients = False
    """Whether tensor-parallel ranks that hold the same weight each have a part of its gradient after the backward."""

    def __init__(
        self,
        full_shape: tuple[int, int],
        shard_dim: int | None,
        tp: TensorParallel,
        padded_size: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.full_shape, self.shard_dim, self.tp = full_shape, shard_dim, tp
        self.lora = None
        self.shard_dims = {"weight": shard_dim, "bias": 0 if shard_dim == 0 else None}
        local_shape = list(full_shape)
        if shard_dim is not None:
            size = padded_size or full_shape[shard_dim]
            if size % tp.size or size < full_shape[shard_dim]:
                raise ValueError(
                    f"a weight of shape {full_shape} does not spread over {tp.size} ranks (padded size {size})"
                )
            local_shape[shard_dim] = size // tp.size
        self.weight = nn.Parameter(torch.empty(local_shape, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(local_shape[0], dtype=torch.float32)) if bias else None

    @torch.no_grad()
    def init_normal(self, name: str, seed: int, std: float) -> None:
        """Draw this rank's part of the initial weight, as `init_part` does; a bias becomes zero."""
        local, first = local_rows(self.weight)
        start = [first, 0]
        if self.shard_dim is not None:
            start[self.shard_dim] += self.tp.rank * self.weight.shape[self.shard_dim]
        self.init_part(local, start, name, seed, std)
        if self.bias is not None:
            local_rows(self.bias)[0].zero_()

    @torch.no_grad()
    def init_part(self, part: Tensor, start: Sequence[int], name: str, seed: int, std: float) -> None:
        """Draw `part`, fp32, a rectangle of the initial weight whose first row and column are `start`: N(0, std²) from
        (seed, name). The full weight is the same in every layout; padding becomes zero."""
        rows, columns = (max(0, size - offset) for size, offset in zip(self.full_shape, start, strict=True))
        fill_normal(part[:rows, :columns], std, seed=seed, name=name, first_row=start[0], first_column=start[1])
        part[rows:].zero_()
        part[:, columns:].zero_()


def shard_dims(model: nn.Module) -> dict[str, int | None]:
    """Return, for each parameter by name, the dimension along which tensor-parallel ranks share it; None where each
    rank holds all of it."""
    dims: dict[str, int | None] = {}
    for name, _ in model.named_parameters():
        layer, _, parameter = name.rpartition(".")
        dims[name] = getattr(model.get_submodule(layer), "shard_dims", {}).get(parameter)
    return dims


def partial_gradients(model: nn.Module, tp: TensorParallel) -> set[str]:
    """Return the names of the parameters that every tensor-parallel rank holds all of, but has only a part of the
    gradient of after the backward: the sum over the ranks is the gradient."""
    if tp.size == 1:
        return set()
    copies = [name for name, dim in shard_dims(model).items() if dim is None]
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in copies}
    return {name for name in copies if tp.sequence or getattr(layers[name], "has_partial_gradients", False)}


def local_rows(weight: Tensor) -> tuple[Tensor, int]:
    """Return the rows of `weight` that this rank holds under FSDP2, sharing memory, and the index of the first."""
    if not isinstance(weight, DTensor):
        return weight, 0
    mesh = weight.device_mesh  # the last dimension is that of the shards, cut as torch.chunk cuts
    rows = -(-weight.shape[0] // mesh.size(-1))
    return weight.to_local(), min(mesh.get_local_rank(mesh.ndim - 1) * rows, weight.shape[0])


class ColumnParallelLinear(ShardedWeight):
    """Computes y = x Wᵀ + b with the outputs spread over the ranks: [N, in_features] → [N, out_features / ranks].

    `x` must be the result of `tp.enter`, which several such layers can share.
    """

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, bias: bool = False) -> None:
        super().__init__((out_features, in_features), 0, tp, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return y if self.lora is None else y + self.lora(x)


class RowParallelLinear(ShardedWeight):
    """Computes y = x Wᵀ + b with the inputs spread over the ranks: [N, in_features / ranks] → [N or N / ranks,
    out_features]."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, bias: bool = False) -> None:
        super().__init__((out_features, in_features), 1, tp, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        y = self.tp.leave(y if self.lora is None else y + self.lora(x))
        return y if self.bias is None else y + self.bias.to(y.dtype)  # once, after the sum over the ranks


class VocabParallelEmbedding(ShardedWeight):
    """Embeds tokens, with the vocabulary spread over the ranks and padded to `padded_size`: int64 [N] →
    [N or N / ranks, hidden]."""

    def __init__(self, num_embeddings: int, embedding_dim: int, tp: TensorParallel, padded_size: int) -> None:
        super().__init__((num_embeddings, embedding_dim), 0, tp, padded_size)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - self.tp.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        embedded = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.tp.leave(embedded.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class PositionEmbedding(ShardedWeight):
    """Embeds positions, of which every rank holds all: int64 [N] → [N or N / ranks, hidden]."""

    def __init__(self, num_embeddings: int, embedding_dim: int, tp: TensorParallel) -> None:
        super().__init__((num_embeddings, embedding_dim), None, tp)

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(self.tp.take_local(positions), self.weight)
