"""The layers of a Llama: attention, feed-forward, and the transformer layer with its norms and residuals.

Tokens are rows: each rank computes N = B · S tokens [N, H] of the B sequences of a micro-batch, where S is smaller than
the sequence under context parallelism. Under sequence parallelism, each tensor-parallel rank has a slice of these
tokens between the matrix products.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from megatron_lfr.model.attention import Mask, block_sparse, dot_product
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.fused import LayerKernels
from megatron_lfr.model.norm import RMSNorm
from megatron_lfr.parallel.collectives import group_size
from megatron_lfr.parallel.context import gather_sequence, local_chunks
from megatron_lfr.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel

RecomputeGranularity = Literal["full", "selective"]


class Attention(nn.Module):
    """Causal self-attention with grouped queries.

    The rows of `qkv.weight` are, for each query group in turn, its query heads, its key head and its value head, so
    that contiguous slices of whole groups are what tensor-parallel ranks hold.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        context_group: ProcessGroup | None,
        recompute: bool,
        kernels: LayerKernels,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // config.query_groups
        width = config.num_attention_heads * config.head_dim
        self.qkv = ColumnParallelLinear(config.hidden_size, width + 2 * config.query_groups * config.head_dim, tp)
        self.output = RowParallelLinear(width, config.hidden_size, tp)
        self.tp, self.context_group, self.recompute = tp, context_group, recompute
        self.split_and_rotate = kernels.split_and_rotate

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        qkv = self.qkv(self.tp.enter(x))
        if self.recompute and torch.is_grad_enabled():
            mixed = checkpoint(self._attend, qkv, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._attend(qkv, cos, sin, mask)
        y: Tensor = self.output(mixed)
        return y

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        qkv = qkv.view(
            -1, cos.shape[1], qkv.shape[-1] // (self.heads + 2) // self.head_dim, self.heads + 2, self.head_dim
        )
        q, k, v = self.split_and_rotate(qkv, cos, sin, self.heads)  # [B, S, groups, heads, D], [B, S, groups, D] twice
        q = q.flatten(2, 3)
        if self.context_group is not None and group_size(self.context_group) > 1:
            k, v = gather_sequence(torch.stack((k, v), 2), self.context_group).unbind(2)
        if isinstance(mask, BlockMask):
            mixed = block_sparse(q, k, v, mask)
        elif group_size(self.context_group) == 1:
            mixed = dot_product(q, k, v, mask, is_causal=mask is None)
        else:
            mixed = self._attend_by_chunk(q, k, v, mask)
        return mixed.flatten(2).flatten(0, 1)

    def _attend_by_chunk(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Let each of this rank's two chunks of tokens attend to the whole sequence up to the chunk's end."""
        size = q.shape[1] // 2
        mixed = []
        for i, chunk in enumerate(local_chunks(self.context_group)):
            end = (chunk + 1) * size
            rows = slice(i * size, (i + 1) * size)
            visible = _causal_end(size, end, q.device) if mask is None else mask[:, :, rows, :end]
            mixed.append(dot_product(q[:, rows], k[:, :end], v[:, :end], visible, is_causal=False))
        return torch.cat(mixed, 1)


def _causal_end(rows: int, length: int, device: torch.device) -> Tensor:
    """Return which of `length` tokens the last `rows` of them see."""
    if torch.compiler.is_compiling():  # the compiler does not know the mask that PyTorch's fused kernels recognise
        return torch.ones(rows, length, dtype=torch.bool, device=device).tril(length - rows)
    return causal_lower_right(rows, length)


class FeedForward(nn.Module):
    """The feed-forward layer, gated by SwiGLU: W_down · (silu(W_gate · x) ∘ W_up · x)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: LayerKernels) -> None:
        super().__init__()
        self.gate = ColumnParallelLinear(config.hidden_size, config.ffn_size, tp)
        self.up = ColumnParallelLinear(config.hidden_size, config.ffn_size, tp)
        self.down = RowParallelLinear(config.ffn_size, config.hidden_size, tp)
        self.tp, self.swiglu = tp, kernels.swiglu

    def forward(self, x: Tensor) -> Tensor:
        x = self.tp.enter(x)
        y: Tensor = self.down(self.swiglu(self.gate(x), self.up(x)))
        return y


class TransformerLayer(nn.Module):
    """Attention and feed-forward; each takes a normed input, and its output is added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        context_group: ProcessGroup | None,
        recompute: RecomputeGranularity | None,
        kernels: LayerKernels,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon, kernels.rms_norm)
        self.attention = Attention(config, tp, context_group, recompute == "selective", kernels)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon, kernels.rms_norm)
        self.feed_forward = FeedForward(config, tp, kernels)
        self.recompute = recompute == "full"

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            y: Tensor = checkpoint(self._compute, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            return y
        return self._compute(x, cos, sin, mask)

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        y: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return y
