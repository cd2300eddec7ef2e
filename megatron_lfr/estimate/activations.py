"""Bytes that autograd keeps of a micro-batch from the forward pass to the backward pass, tensor by tensor.

A rank computes N tokens at a time; under sequence parallelism it has N / tensor-parallel ranks of them between the
matrix products. Tensors that do not grow with N (norms' weights) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_lfr.kernels.block_cross_entropy import CHUNK_ROWS, SAVE_BUDGET_BYTES
from megatron_lfr.model.attention import AttentionBackend, mask_bytes, scores_bytes
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.dropout import DropoutConfig
from megatron_lfr.model.layers import RecomputeGranularity
from megatron_lfr.model.lora import LoRAConfig, adapter_factors
from megatron_lfr.parallel.pipeline import Stage


@dataclass(frozen=True)
class MicroBatch:
    """The part of a micro-batch that a rank computes, and the settings that decide what is kept of it."""

    model: ModelConfig
    rows: int
    seq_length: int
    tensor_ranks: int = 1
    sequence_parallel: bool = False
    context_ranks: int = 1
    itemsize: int = 4
    """Bytes of an element of the activations: 2 with --bf16."""
    recompute: RecomputeGranularity | None = None
    has_positions: bool = False
    """Value of --reset-position-ids."""
    has_mask: bool = False
    """Value of --reset-attention-mask."""
    attention_backend: AttentionBackend = "sdpa"
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    saves_logits: bool = False
    """Whether the logits' gradient is kept whatever its size, as under GPipe."""
    on_gpu: bool = True

    @property
    def tokens(self) -> int:
        """Number of tokens N that this rank computes."""
        return self.rows * self.seq_length // self.context_ranks

    @property
    def tokens_between(self) -> int:
        """Number of tokens that this rank has between the matrix products."""
        return self.tokens // self.tensor_ranks if self.sequence_parallel else self.tokens

    @property
    def hidden(self) -> int:
        """Bytes of the residual stream, which pipeline stages send to each other."""
        return self.itemsize * self.tokens_between * self.model.hidden_size

    @property
    def masks(self) -> bool:
        """Whether all layers share a mask of attention."""
        return self.has_mask or self.model.window(self.seq_length) is not None

    @property
    def dropped(self) -> int:
        """Bytes of what dropout keeps of the residual stream at one place: which elements it drops."""
        return self.tokens_between * self.model.hidden_size if self.dropout.hidden_dropout else 0

    @property
    def scores(self) -> int:
        """Number of attention's scores of a layer that this rank computes, where it computes all of them."""
        heads = self.model.num_attention_heads // self.tensor_ranks
        return self.tokens * self.seq_length * heads if self.dropout.attention_dropout else 0

    @property
    def has_adapters(self) -> bool:
        return self.lora.lora_rank is not None

    @property
    def vocabulary_rows(self) -> int:
        """Number of this rank's rows of the output embedding."""
        return self.model.padded_vocab_size // self.tensor_ranks

    @property
    def keeps_logits(self) -> bool:
        """Whether the loss keeps the gradient of its logits, as block_cross_entropy decides."""
        return self.saves_logits or 4 * self.tokens * self.vocabulary_rows <= SAVE_BUDGET_BYTES


def layer_bytes(batch: MicroBatch) -> int:
    """Return the bytes that one layer keeps."""
    return batch.hidden if batch.recompute == "full" else _layer(batch, batch.recompute == "selective")


def recomputed_bytes(batch: MicroBatch) -> int:
    """Return the bytes of what a layer's backward computes again, which exist for one layer at a time."""
    if batch.recompute is None:
        return 0
    return _layer(batch, False) - batch.hidden if batch.recompute == "full" else _attention(batch)


def backward_bytes(batch: MicroBatch) -> int:
    """Return the bytes that a layer's backward holds at a time: gradients of activations (a norm's in fp32 on a
    CPU)."""
    norm = 2 * (batch.itemsize if batch.on_gpu else 4) * batch.tokens_between * batch.model.hidden_size
    feed_forward = batch.hidden + norm + batch.itemsize * batch.tokens * batch.model.ffn_size // batch.tensor_ranks
    if batch.has_adapters:  # the gradients of what an adapter adds to an output, and through it of the input
        feed_forward += (
            batch.itemsize * batch.tokens * (batch.model.ffn_size // batch.tensor_ranks + batch.model.hidden_size)
        )
    # Attention with dropout: the gradients of its weights, and of its scores in fp32.
    return max(feed_forward, batch.hidden + (batch.itemsize + 4) * batch.scores)


def stage_bytes(batch: MicroBatch, stage: Stage) -> int:
    """Return the bytes that a pipeline stage keeps, without what the loss keeps."""
    model, length = batch.model, batch.seq_length // batch.context_ranks
    kept = (stage.end_layer - stage.first_layer) * layer_bytes(batch)
    if model.has_rope:
        kept += 2 * 4 * (batch.rows if batch.has_positions else 1) * length * model.head_dim  # cosines and sines
    kept += mask_bytes(
        batch.attention_backend,
        batch.rows,
        batch.seq_length,
        batch.context_ranks,
        batch.has_mask,
        model.window(batch.seq_length) is not None,
        batch.itemsize,
    )
    if stage.is_first and not batch.has_adapters:
        kept += 8 * batch.tokens + batch.dropped  # the token ids
        kept += 0 if model.has_rope else 8 * batch.tokens_between  # their positions
    if stage.is_first and batch.has_adapters and batch.recompute != "full" and not model.norm_after_sublayers:
        kept -= _norm(batch)  # nothing before the first adapter has a gradient
    if stage.is_last:
        kept += _norm(batch) + (batch.itemsize * batch.tokens * model.hidden_size if batch.keeps_logits else 0)
    return kept


def logits_kept(batch: MicroBatch) -> int:
    """Return the bytes that the loss keeps: the gradient of its logits, or those of the hidden states and the output
    embedding."""
    width = batch.model.hidden_size
    if batch.keeps_logits:
        return batch.tokens * batch.vocabulary_rows * (batch.itemsize if batch.on_gpu else 4)
    hidden = batch.itemsize if batch.tensor_ranks == 1 else 4
    return (0 if batch.has_adapters else 4 * batch.vocabulary_rows * width) + hidden * batch.tokens * width


def logits_peak(batch: MicroBatch) -> int:
    """Return the most bytes that the loss holds at a time: the logits and their gradient, or what the backward computes
    from it."""
    vocabulary, width, half = batch.vocabulary_rows, batch.model.hidden_size, batch.itemsize < 4
    held = min(batch.tokens, batch.tokens if batch.keeps_logits else CHUNK_ROWS)
    logits = held * vocabulary * (4 + (batch.itemsize if half and batch.on_gpu else 0))
    if batch.model.final_logit_softcapping and not batch.on_gpu:
        logits += 4 * held * vocabulary  # the cap's slope, which a GPU computes again
    # A CPU multiplies in fp32: it casts the weight and the hidden states.
    casts = 4 * vocabulary * width if half and not batch.on_gpu else 0
    products = (4 * width, batch.itemsize * width)  # the gradients in fp32, and in their own type
    forward = logits + casts + (0 if batch.keeps_logits else logits_kept(batch))
    rows = 0 if batch.has_adapters else vocabulary  # that have a gradient
    if not batch.keeps_logits:
        return max(forward, logits_kept(batch) + products[1] * (rows + batch.tokens))
    return max(forward, logits_kept(batch) + sum(products) * rows + products[0] * batch.tokens + casts)


def _layer(batch: MicroBatch, recomputes_attention: bool) -> int:
    model, e = batch.model, batch.itemsize
    attention = _attention_kept(batch) if recomputes_attention else _attention(batch)
    # The inputs of products of which a weight is trained: the first ones of attention and feed-forward, the last one.
    inputs = batch.lora.adapts(model, "q", "k", "v") + batch.lora.adapts(model, "gate", "up")
    widths = (2 if model.swiglu else 1) + batch.lora.adapts(model, "down")  # gate, up, silu(gate) · up, or up, gelu(up)
    feed_forward = widths * e * batch.tokens * model.ffn_size // batch.tensor_ranks
    kept = 2 * (_norm(batch) + batch.dropped) + inputs * e * batch.tokens * model.hidden_size + attention + feed_forward
    return kept + _adapters(batch)


def _adapters(batch: MicroBatch) -> int:
    """Return the bytes that a layer's adapters keep beside their inputs: the products of these with A."""
    rank = batch.lora.lora_rank or 0
    return batch.itemsize * batch.tokens * rank * len(adapter_factors(batch.model, batch.lora)) if rank else 0


def _norm(batch: MicroBatch) -> int:
    """Return the bytes that a norm keeps: its input, and each token's scale in fp32, and mean for a LayerNorm."""
    return batch.hidden + (8 if batch.model.normalization == "LayerNorm" else 4) * batch.tokens_between


def _widths(batch: MicroBatch) -> tuple[int, int]:
    """Return the number of channels of this rank's queries, and of its keys."""
    model = batch.model
    return (
        model.num_attention_heads * model.head_dim // batch.tensor_ranks,
        model.query_groups * model.head_dim // batch.tensor_ranks,
    )


def _attention(batch: MicroBatch) -> int:
    """Return the bytes that attention keeps: queries, keys, values, the softmax's sums and the output."""
    model, e, tokens = batch.model, batch.itemsize, batch.tokens
    queries, keys = _widths(batch)
    if batch.scores:
        # Queries, keys and values of all heads, the output, what each token sees, and the scores.
        copies = e * tokens * queries * (2 + 2 * batch.context_ranks)
        sees = 0 if batch.masks else batch.seq_length**2 // batch.context_ranks
        return copies + sees + scores_bytes(batch.scores, e) + _query_key_norms(batch)
    is_grouped = queries > keys > model.head_dim
    rotated = e * tokens * (queries + keys)
    copied = e * tokens * queries if is_grouped else 0  # heads of several groups are brought together
    if batch.context_ranks == 1:
        held = rotated + copied + e * tokens * keys
    else:  # keys and values of the whole sequence; the outputs of sdpa's two chunks are joined
        joined = e * tokens * queries if batch.attention_backend == "sdpa" else 0
        held = (copied or rotated) + 2 * e * tokens * batch.context_ranks * keys + joined
    sums = 4 * tokens * model.num_attention_heads // batch.tensor_ranks
    return held + sums + e * tokens * queries + _query_key_norms(batch)


def _query_key_norms(batch: MicroBatch) -> int:
    """Return the bytes that the norms of queries and keys keep: their inputs, with which values are one tensor, or,
    where a norm takes all heads, the queries and keys in fp32, before and, for the gradient of its weight, after."""
    model, (queries, keys) = batch.model, _widths(batch)
    if not model.qk_layernorm:
        return 0
    if model.qk_layernorm_across_heads:
        copies = 1 if batch.has_adapters else 2  # what a frozen weight multiplies is not kept
        return batch.tokens * (copies * 4 * (queries + keys) + 2 * 4)
    return batch.tokens * (batch.itemsize * (queries + 2 * keys) + 4 * (queries + keys) // model.head_dim)


def _attention_kept(batch: MicroBatch) -> int:
    """Return the bytes that attention keeps where it is recomputed: its input and its output."""
    queries, keys = _widths(batch)
    return batch.itemsize * batch.tokens * (2 * queries + 2 * keys)
