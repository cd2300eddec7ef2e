"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685) of the parallel linear layers.

A layer that computes x Wᵀ computes x Wᵀ + s · (x Aᵀ) Bᵀ, with A [r, inputs] and B [outputs, r]. B of a column-parallel
layer is spread over the ranks by its rows, as the outputs are, and A of a row-parallel layer by its columns, as the
inputs are: what the ranks compute joins what the layer does before its own communication, and needs none in the
forward. The other factor is the same on all ranks, and each rank's backward gives a part of its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lfr.parallel.counter_random import fill_uniform
from megatron_lfr.parallel.layers import ShardedWeight, TensorParallel


class LoRAFactor(ShardedWeight):
    """One factor of a pair. Its initial values are uniform in [-bound, bound)."""

    def __init__(self, full_shape: tuple[int, int], shard_dim: int | None, tp: TensorParallel, bound: float) -> None:
        super().__init__(full_shape, shard_dim, tp)
        self.bound, self.has_partial_gradients = bound, shard_dim is None

    @torch.no_grad()
    def init_part(self, part: Tensor, start: Sequence[int], name: str, seed: int, std: float) -> None:
        """Draw `part`, as ShardedWeight's does, but for the distribution; `std` is not used."""
        fill_uniform(part, self.bound, seed=seed, name=name, first_row=start[0], first_column=start[1])


class LoRAPair(nn.Module):
    """The factors A and B of one module; they begin as in the peft package: A uniform in ±1/√inputs, which is
    Kaiming's with a = √5, and B zero.

    layer: whose inputs and outputs are spread over the ranks as the pair's. outputs: the number of the layer's outputs
    that the pair adds to, over all ranks.
    """

    def __init__(self, layer: ShardedWeight, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        inputs, is_column_parallel = layer.full_shape[1], layer.shard_dim == 0
        self.A = LoRAFactor((rank, inputs), None if is_column_parallel else 1, layer.tp, 1 / math.sqrt(inputs))
        self.B = LoRAFactor((outputs, rank), 0 if is_column_parallel else None, layer.tp, 0.0)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Compute s · (x Aᵀ) Bᵀ: [N, inputs] → [N, outputs], of this rank; on row-parallel ranks, a part of the sum."""
        return F.linear(F.linear(x, self.A.weight.to(x.dtype)), self.B.weight.to(x.dtype)) * self.scale


class LoRA(nn.ModuleDict):
    """The pairs of a linear layer, by name, of which each adds to one part of the outputs.

    parts: names and numbers of outputs, over all ranks, of all parts, of which those in `adapted` get a pair. groups:
    the outputs are this many groups, over all ranks, each of which has an equal share of every part, in this order.
    """

    def __init__(
        self,
        layer: ShardedWeight,
        parts: Mapping[str, int],
        adapted: Collection[str],
        groups: int,
        rank: int,
        scale: float,
    ) -> None:
        super().__init__({name: LoRAPair(layer, parts[name], rank, scale) for name in parts if name in adapted})
        ranks = layer.tp.size if layer.shard_dim == 0 else 1
        self.outputs = {name: size // ranks for name, size in parts.items()}
        self.groups = max(1, groups // ranks)

    def forward(self, x: Tensor) -> Tensor:
        """Compute what is added to this rank's outputs, in their order: [N, inputs] → [N, outputs]."""
        parts = [self[name](x) if name in self else x.new_zeros(len(x), size) for name, size in self.outputs.items()]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in parts], -1).flatten(-2)
