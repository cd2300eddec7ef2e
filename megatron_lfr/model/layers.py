"""The layers of a decoder: attention, feed-forward, and the transformer layer with its norms and residuals.

Tokens are rows: each rank computes N = B · S tokens [N, H] of the B sequences of a micro-batch, where S is smaller than
the sequence under context parallelism. Under sequence parallelism, each tensor-parallel rank has a slice of these
tokens between the matrix products.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from megatron_lfr.model.attention import Mask, block_sparse, dot_product, dropping_product
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.dropout import DropoutConfig, Site, draw, draw_dropped, drop
from megatron_lfr.model.fused import LayerKernels
from megatron_lfr.model.norm import Norm, RMSNormAcrossHeads
from megatron_lfr.parallel.collectives import group_size
from megatron_lfr.parallel.context import gather_sequence, local_chunks
from megatron_lfr.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel

RecomputeGranularity = Literal["full", "selective"]


class Tokens(NamedTuple):
    """What layers know of the tokens of a micro-batch beside their hidden states."""

    rows: Tensor
    """Positions in their sequences of the S tokens of each sequence on this rank: int64 [S]."""
    rope: tuple[Tensor, Tensor] | None
    """Cosines and signed sines of their positions, each [B or 1, S, 1, 1, head_dim]; None without rotary positions."""
    mask: Mask
    keys: Tensor | None = None
    """Keys of the dropout in this layer, one for each sequence: int64 [B]; None where nothing is dropped."""

    @property
    def length(self) -> int:
        """Number of tokens S of each sequence on this rank."""
        return len(self.rows)

    def token_keys(self, keys: Tensor) -> Tensor:
        """Return the keys of all tokens [B · S] that follow from those of their sequences [B]."""
        return draw(keys[:, None], self.rows).flatten()


def make_norm(config: ModelConfig, size: int, kernels: LayerKernels, tp: TensorParallel | None = None) -> Norm:
    """Make a norm of `size` channels; `tp` as for Norm."""
    is_layer_norm = config.normalization == "LayerNorm"
    function = kernels.layer_norm if is_layer_norm else kernels.rms_norm
    return Norm(size, config.norm_epsilon, function, bias=is_layer_norm, tp=tp)


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
        dropout: float,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // config.query_groups
        queries, keys = config.num_attention_heads * config.head_dim, config.query_groups * config.head_dim
        self.qkv = ColumnParallelLinear(config.hidden_size, queries + 2 * keys, tp, config.has_qkv_bias)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if config.qk_layernorm_across_heads:
            self.query_norm = RMSNormAcrossHeads(queries, config.norm_epsilon, tp)
            self.key_norm = RMSNormAcrossHeads(keys, config.norm_epsilon, tp)
        elif config.qk_layernorm:
            self.query_norm = make_norm(config, config.head_dim, kernels, tp)
            self.key_norm = make_norm(config, config.head_dim, kernels, tp)
        self.output = RowParallelLinear(queries, config.hidden_size, tp, config.has_attention_output_bias)
        self.tp, self.context_group, self.recompute, self.dropout = tp, context_group, recompute, dropout
        self.tp_rank = tp.rank
        self.split_and_rotate = kernels.split_and_rotate

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        qkv = self.qkv(self.tp.enter(x))
        if self.recompute and torch.is_grad_enabled():
            mixed = checkpoint(self._attend, qkv, tokens, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._attend(qkv, tokens)
        y: Tensor = self.output(mixed)
        return y

    def _attend(self, qkv: Tensor, tokens: Tokens) -> Tensor:
        groups, mask = qkv.shape[-1] // (self.heads + 2) // self.head_dim, tokens.mask
        q, k, v = self._split(qkv.view(-1, tokens.length, groups, self.heads + 2, self.head_dim), tokens)
        q = q.flatten(2, 3)
        if self.context_group is not None and group_size(self.context_group) > 1:
            k, v = gather_sequence(torch.stack((k, v), 2), self.context_group).unbind(2)
        if tokens.keys is not None and self.dropout:
            assert not isinstance(mask, BlockMask)
            dropped = self._draw_dropped(tokens.keys, tokens.rows, q.shape[2], k.shape[1])
            mixed = dropping_product(q, k, v, mask, tokens.rows, dropped, self.dropout)
        elif isinstance(mask, BlockMask):
            mixed = block_sparse(q, k, v, mask)
        elif group_size(self.context_group) == 1:
            mixed = dot_product(q, k, v, mask, is_causal=mask is None)
        else:
            mixed = self._attend_by_chunk(q, k, v, mask)
        return mixed.flatten(2).flatten(0, 1)

    def _split(self, qkv: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv [B, S, groups, heads + 2, D] into queries [B, S, groups, heads, D], and keys and values [B, S,
        groups, D], which are normed and rotated if the model does so."""
        if self.query_norm is not None and self.key_norm is not None:
            q, k, v = torch.split(qkv, [self.heads, 1, 1], -2)
            qkv = torch.cat((self.query_norm(q), self.key_norm(k), v), -2)
        if tokens.rope is None:
            return qkv[..., : self.heads, :], qkv[..., self.heads, :], qkv[..., self.heads + 1, :]
        return self.split_and_rotate(qkv, *tokens.rope, self.heads)

    def _draw_dropped(self, keys: Tensor, rows: Tensor, heads: int, length: int) -> Tensor:
        """Draw which weights of this rank's `heads` heads are dropped: bool [B, heads, R, S]."""
        numbers = torch.arange(heads, device=rows.device)
        of_heads = draw(draw(keys, Site.ATTENTION)[:, None], numbers, self.tp_rank * heads)
        return draw_dropped(draw(of_heads[..., None], rows), length, self.dropout)

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
    """The feed-forward layer, gated by SwiGLU: W_down · (silu(W_gate · x) ∘ W_up · x), or without a gate:
    W_down · gelu(W_up · x); biases apart."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: LayerKernels) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.ffn_size, config.has_mlp_bias
        self.gate = ColumnParallelLinear(hidden, width, tp, bias) if config.swiglu else None
        self.up = ColumnParallelLinear(hidden, width, tp, bias)
        self.down = RowParallelLinear(width, hidden, tp, bias)
        self.tp, self.swiglu = tp, kernels.swiglu

    def forward(self, x: Tensor) -> Tensor:
        x = self.tp.enter(x)
        if self.gate is None:
            activated = F.gelu(self.up(x), approximate="tanh")
        else:
            activated = self.swiglu(self.gate(x), self.up(x))
        y: Tensor = self.down(activated)
        return y


class TransformerLayer(nn.Module):
    """Attention and feed-forward; each takes a normed input, or has a normed output, which is added to the residual
    stream."""

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        context_group: ProcessGroup | None,
        recompute: RecomputeGranularity | None,
        kernels: LayerKernels,
        dropout: DropoutConfig,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.hidden_size, kernels)
        self.attention = Attention(
            config, tp, context_group, recompute == "selective", kernels, dropout.attention_dropout
        )
        self.feed_forward_norm = make_norm(config, config.hidden_size, kernels)
        self.feed_forward = FeedForward(config, tp, kernels)
        self.recompute, self.norm_after_sublayers = recompute == "full", config.norm_after_sublayers
        self.tp, self.dropout = tp, dropout.hidden_dropout

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            y: Tensor = checkpoint(self._compute, x, tokens, use_reentrant=False, preserve_rng_state=False)
            return y
        return self._compute(x, tokens)

    def _compute(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self.norm_after_sublayers:
            x = x + self._drop(self.attention_norm(self.attention(x, tokens)), tokens, Site.ATTENTION_OUTPUT)
            return x + self._drop(self.feed_forward_norm(self.feed_forward(x)), tokens, Site.FEED_FORWARD)
        x = x + self._drop(self.attention(self.attention_norm(x), tokens), tokens, Site.ATTENTION_OUTPUT)
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x)), tokens, Site.FEED_FORWARD)

    def _drop(self, y: Tensor, tokens: Tokens, site: Site) -> Tensor:
        if tokens.keys is None or not self.dropout:
            return y
        keys = tokens.token_keys(draw(tokens.keys, site))
        return drop(y, self.tp.take_local(keys), self.dropout)
