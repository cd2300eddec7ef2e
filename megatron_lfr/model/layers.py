"""The layers of a Llama: attention, feed-forward, and the two with their norms and residuals."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.norm import RMSNorm
from megatron_lfr.model.rope import split_and_rotate
from megatron_lfr.parallel.layers import ColumnParallelLinear, RowParallelLinear


class Attention(nn.Module):
    """Causal self-attention with grouped queries.

    The rows of `qkv.weight` are, for each query group in turn, its query heads, its key head and its value head, so
    that contiguous slices of whole groups are what tensor-parallel ranks hold.
    """

    def __init__(self, config: ModelConfig, group: ProcessGroup | None, recompute: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // config.query_groups
        width = config.num_attention_heads * config.head_dim
        self.qkv = ColumnParallelLinear(config.hidden_size, width + 2 * config.query_groups * config.head_dim, group)
        self.output = RowParallelLinear(width, config.hidden_size, group)
        self.recompute = recompute

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(x)
        if self.recompute and torch.is_grad_enabled():
            mixed = checkpoint(self._attend, qkv, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._attend(qkv, cos, sin, mask)
        y: Tensor = self.output(mixed)
        return y

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        qkv = qkv.view(*qkv.shape[:2], -1, self.heads + 2, self.head_dim)  # [B, S, groups, heads + 2, D]
        q, k, v = split_and_rotate(qkv, cos, sin, self.heads)
        mixed = F.scaled_dot_product_attention(
            q.flatten(2, 3).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.heads > 1,
        )
        return mixed.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202). `gate_up.weight` [2, ffn, hidden]: gate, then up."""

    def __init__(self, config: ModelConfig, group: ProcessGroup | None) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(config.hidden_size, config.ffn_size, group, stack=2)
        self.down = RowParallelLinear(config.ffn_size, config.hidden_size, group)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: ModelConfig, group: ProcessGroup | None, recompute_attention: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, group, recompute_attention)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.feed_forward = FeedForward(config, group)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        y: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return y


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What SDPA adds to its scores: 0 for earlier tokens of the same document, else −inf. [B, 1, S, S] in `dtype`."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    visible = same.tril_()
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -torch.inf).unsqueeze(1)
