"""Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971; grouped queries and positions as in Llama 3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_lfr.kernels import BlockStats, block_cross_entropy
from megatron_lfr.kernels.block_cross_entropy import Mode
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.layers import TransformerLayer, document_mask
from megatron_lfr.model.norm import RMSNorm
from megatron_lfr.model.rope import rope_tables
from megatron_lfr.parallel.collectives import group_size
from megatron_lfr.parallel.layers import RowParallelLinear, ShardedWeight, VocabParallelEmbedding

RecomputeGranularity = Literal["full", "selective"]


class Llama(nn.Module):
    """A Llama on one rank of `tp_group` (None: one rank), with initial weights that depend on `seed` alone.

    Weights are fp32; activations are `compute_dtype`. `recompute_granularity` drops the activations of whole layers
    ("full") or of attention between its linear layers ("selective") and computes them again in the backward.
    ValueError for a configuration that does not fit.
    """

    rope_cos: Tensor
    rope_sin: Tensor

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
        self.layers = nn.ModuleList(
            TransformerLayer(config, tp_group, recompute_attention=recompute_granularity == "selective")
            for _ in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        untied = config.untie_embeddings_and_output_weights
        self.output = ShardedWeight(shape, 0, tp_group, padded) if untied else None
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights(seed)

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
        return (self.embedding if self.output is None else self.output).weight

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
