"""Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971; grouped queries and positions as in Llama 3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_lfr.kernels import BlockStats, block_cross_entropy
from megatron_lfr.kernels.block_cross_entropy import Mode
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.norm import RMSNorm
from megatron_lfr.model.rope import rope_tables, split_and_rotate
from megatron_lfr.parallel.collectives import group_size
from megatron_lfr.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    ShardedWeight,
    VocabParallelEmbedding,
)

RecomputeGranularity = Literal["full", "selective"]


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
        qkv = qkv.unflatten(-1, (-1, self.heads + 2, self.head_dim))  # [B, S, groups, heads + 2, D]
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


class Layer(nn.Module):
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


class Llama(nn.Module):
    """A Llama on one rank of `tp_group` (None: one rank), with initial weights that depend on `seed` alone.

    Weights are fp32; activations are `compute_dtype`. `recompute_granularity` drops the activations of whole layers
    ("full") or of attention between its linear layers ("selective") and computes them again in the backward.
    ValueError for a configuration that does not fit.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        tp_group: ProcessGroup | None = None,
        compute_dtype: torch.dtype = torch.float32,
        recompute_granularity: RecomputeGranularity | None = None,
    ) -> None:
        super().__init__()
        ranks = group_size(tp_group)
        config.validate(ranks)
        padded = config.padded_vocab_size(ranks)
        assert config.vocab_size is not None
        self.config, self.tp_group, self.compute_dtype = config, tp_group, compute_dtype
        self.vocab_size = config.vocab_size
        self.recompute_layers = recompute_granularity == "full"
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = VocabParallelEmbedding(*shape, tp_group, padded)
        recompute_attention = recompute_granularity == "selective"
        self.layers = nn.ModuleList(Layer(config, tp_group, recompute_attention) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.output = ShardedWeight(shape, 0, tp_group, padded) if self._is_untied else None
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights(seed)

    @property
    def _is_untied(self) -> bool:
        return self.config.untie_embeddings_and_output_weights

    def init_weights(self, seed: int) -> None:
        """Draw the initial weights: normal, smaller by √(2 · layers) where a layer adds to the residual stream."""
        std = self.config.init_method_std
        for name, module in self.named_modules():
            if isinstance(module, ShardedWeight):
                adds = isinstance(module, RowParallelLinear)
                scale = 1 / math.sqrt(2 * self.config.num_layers) if adds else 1.0
                module.init_normal(f"{name}.weight", seed, std * scale)

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the output embedding: fp32 [padded vocabulary / ranks, H]."""
        return (self.output or self.embedding).weight

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm, [B, S, H] in `compute_dtype`.

        tokens int64 [B, S]; position_ids int64 [B, S], by default 0, 1, ...; document_ids int64 [B, S]: a token
        attends to the earlier tokens of its own document only, by default to all earlier tokens of its row.
        """
        cos, sin = self._rope(tokens, position_ids)
        mask = None if document_ids is None else document_mask(document_ids, self.compute_dtype)
        x = self.embedding(tokens).to(self.compute_dtype)
        for layer in self.layers:
            if self.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, mask)
        hidden: Tensor = self.final_norm(x)
        return hidden

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        token_weight: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        mode: Mode = "auto",
    ) -> tuple[Tensor, BlockStats]:
        """(weighted loss, statistics of each row); see block_cross_entropy for labels, token_weight and mode."""
        return block_cross_entropy(
            self(tokens, position_ids, document_ids),
            self.output_weight,
            labels,
            token_weight,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            mode=mode,
        )

    def _rope(self, tokens: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin at each position: [B or 1, S, 1, 1, head_dim]."""
        length, longest = tokens.shape[1], self.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"a sequence of {length} tokens is longer than --max-position-embeddings {longest}")
        if position_ids is None:
            tables = (self.rope_cos[None, :length], self.rope_sin[None, :length])
        else:
            tables = (self.rope_cos[position_ids], self.rope_sin[position_ids])
        cos, sin = (table[:, :, None, None] for table in tables)
        return cos, sin


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What SDPA adds to its scores: 0 for earlier tokens of the same document, else −inf. [B, 1, S, S] in `dtype`."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    visible = same.tril_()
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -torch.inf).unsqueeze(1)
