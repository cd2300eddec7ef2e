"""Attention's kernels and the masks that they take.

Causal attention over all tokens of a row needs no mask: PyTorch's scaled_dot_product_attention ("sdpa") has fused
kernels for it. Documents that do not see each other, a window of the tokens that each sees, and the tokens of a
context-parallel rank need one. Sdpa takes it dense, of all queries times all keys, for which a GPU has few fused
kernels; flex_attention ("flex", https://arxiv.org/abs/2412.05496) skips the blocks of 128 x 128 tokens that the mask
hides, and asks a function about those that it cuts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

AttentionBackend = Literal["sdpa", "flex"]
Mask = Tensor | BlockMask | None
"""None for causal attention, a tensor that sdpa adds to its scores, or a BlockMask for flex."""

BLOCK = 128
"""Number of tokens along each side of flex_attention's blocks of the score matrix."""
_SMALLEST_HEAD = 16
"""The narrowest head that flex_attention's kernels multiply."""
_flex_attention: Callable[..., Any] = flex_attention


def choose_backend(
    backend: Literal["auto", "sdpa", "flex"],
    *,
    on_gpu: bool,
    has_documents: bool,
    has_window: bool,
    context_ranks: int,
    is_compiled: bool,
    head_dim: int,
    has_dropout: bool = False,
) -> AttentionBackend:
    """Choose what computes attention from --attention-backend; ValueError where that one cannot run.

    "auto" takes flex on a GPU wherever sdpa would need a dense mask. On a context-parallel rank without documents,
    sdpa's fused kernels know the mask, except under torch.compile. Dropout of attention goes with sdpa alone, which
    it takes the place of in training (dropping_product).
    """
    if backend == "flex" and has_dropout:
        raise ValueError("--attention-backend flex: goes without --attention-dropout; choose from auto, sdpa")
    if has_dropout:
        return "sdpa"
    if backend == "flex":
        if not on_gpu:
            raise ValueError("--attention-backend flex: has no backward pass on a CPU; choose from auto, sdpa")
        if head_dim < _SMALLEST_HEAD:
            raise ValueError(
                f"--attention-backend flex: needs heads of {_SMALLEST_HEAD} channels, not {head_dim} "
                "(--kv-channels, or --hidden-size / --num-attention-heads); choose from auto, sdpa"
            )
        if not has_documents and not has_window and context_ranks == 1:
            raise ValueError(
                "--attention-backend flex: goes with --reset-attention-mask, --context-parallel-size above 1, or "
                "--sliding-window below --seq-length; without, attention needs no mask. Choose from auto, sdpa"
            )
        return "flex"
    needs_dense = has_documents or has_window or (context_ranks > 1 and is_compiled)
    return "flex" if backend == "auto" and on_gpu and needs_dense and head_dim >= _SMALLEST_HEAD else "sdpa"


def mask_bytes(
    backend: AttentionBackend,
    rows: int,
    seq_length: int,
    context_ranks: int,
    has_documents: bool,
    has_window: bool,
    itemsize: int,
) -> int:
    """Return the bytes that a micro-batch's mask takes on one rank, as attention_mask makes it for `rows` sequences."""
    queries = seq_length // context_ranks
    if not has_documents:
        rows = 1
    if backend == "sdpa":
        return itemsize * rows * queries * seq_length if has_documents or has_window else 0
    if not has_documents and not has_window and context_ranks == 1:
        return 0
    down, across = -(-queries // BLOCK), -(-seq_length // BLOCK)
    # The numbers and indices of the blocks that are seen in part and in full, each by queries and by keys.
    blocks = 2 * 4 * (down + across + 2 * down * across)
    return 8 * queries + rows * (blocks + (8 * (queries + seq_length) if has_documents else 0))


def describe(
    backend: AttentionBackend,
    *,
    rows: int,
    seq_length: int,
    context_ranks: int,
    has_documents: bool,
    has_window: bool,
    is_compiled: bool,
    itemsize: int,
    dropout_heads: int = 0,
) -> str:
    """Describe in one line which kernel computes attention, and what its mask takes. dropout_heads: number of heads of
    this rank whose attention has dropout."""
    size = mask_bytes(backend, rows, seq_length, context_ranks, has_documents, has_window, itemsize)
    if dropout_heads:
        scores = scores_bytes(rows * dropout_heads * seq_length**2 // context_ranks, itemsize)
        mask = f", and a dense mask of {size:,} bytes a micro-batch" if size else ""
        return (
            f"attention: with dropout, by matrix products that keep {scores:,} bytes of scores for each layer and "
            f"micro-batch (--recompute-granularity keeps those of one layer){mask}; in evaluations, "
            "scaled_dot_product_attention"
        )
    if backend == "flex":
        return f"attention: flex_attention, with a block mask of {size:,} bytes a micro-batch and no dense mask"
    kernel = "attention: scaled_dot_product_attention"
    if has_documents or has_window:
        return (
            f"{kernel}, with a dense {'document' if has_documents else 'window'} mask of {size:,} bytes a micro-batch"
        )
    if context_ranks > 1 and is_compiled:
        chunk = seq_length // (2 * context_ranks)
        return f"{kernel}, with dense causal masks of {(2 * context_ranks + 1) * chunk**2:,} bytes a layer"
    return f"{kernel}, causal and without a mask tensor"


def attention_mask(
    backend: AttentionBackend,
    rows: Tensor,
    length: int,
    document_ids: Tensor | None,
    window: int | None,
    dtype: torch.dtype,
) -> Mask:
    """Make the mask of a micro-batch's sequences of `length` tokens, for all layers; the host waits for no device.

    rows int64 [R]: positions of the tokens that attend; document_ids int64 [B, S], see Decoder.forward; window: number
    of tokens that each sees, itself included; dtype: of the activations.
    """
    masks = document_ids is not None or window is not None
    if backend == "flex" and (masks or len(rows) < length):
        return block_mask(rows, length, document_ids, window)
    return dense_mask(rows, length, document_ids, window, dtype) if masks else None


def dense_mask(
    rows: Tensor, length: int, document_ids: Tensor | None, window: int | None, dtype: torch.dtype
) -> Tensor:
    """Make what sdpa adds to its scores: 0 for a token itself and earlier ones of its document and window, else −inf.

    Arguments as of attention_mask. Returns [B, 1, R, S] in `dtype`, where B is 1 without documents.
    """
    keys = torch.arange(length, device=rows.device)
    visible = (rows[:, None] >= keys).unsqueeze(0)
    if window is not None:
        visible = visible & (rows[:, None] - keys < window)
    if document_ids is not None:
        visible = visible & (document_ids[:, rows, None] == document_ids[:, None, :])
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -torch.inf).unsqueeze(1)


def block_mask(rows: Tensor, length: int, document_ids: Tensor | None, window: int | None = None) -> BlockMask:
    """Make flex_attention's mask of the same tokens.

    It follows from the least and the largest position and document of each block of tokens, where create_block_mask
    would first make a mask of all pairs of tokens. Where document ids do not ascend, flex_attention visits blocks in
    vain, which changes no result.
    """
    of_queries = None if document_ids is None else document_ids[:, rows]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sees = rows[query] >= key
        if window is not None:
            sees = sees & (rows[query] - key < window)
        if document_ids is not None and of_queries is not None:
            sees = sees & (of_queries[batch, query] == document_ids[batch, key])
        return sees

    first_row, last_row = _block_ranges(rows[None], rows=True)
    first_key, last_key = _block_ranges(torch.arange(length, device=rows.device)[None], rows=False)
    seen, full = last_row >= first_key, first_row >= last_key
    if window is not None:
        seen, full = seen & (first_row - last_key < window), full & (last_row - first_key < window)
    if document_ids is not None and of_queries is not None:
        first, last = _block_ranges(of_queries, rows=True)
        first_of_keys, last_of_keys = _block_ranges(document_ids, rows=False)
        seen = seen & (first <= last_of_keys) & (last >= first_of_keys)
        full = full & (first == last_of_keys) & (last == first_of_keys)
    # A block that reaches beyond the end is not full, as in create_block_mask.
    full[:, len(rows) // BLOCK :].fill_(False)
    full[..., length // BLOCK :].fill_(False)
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full), *_listed(full), BLOCK, mask_mod=visible, seq_lengths=(len(rows), length)
    )


def _block_ranges(values: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """Return the least and the largest of each block of `values` [B, N]: [B, blocks, 1] for rows, else
    [B, 1, blocks]."""
    length = values.shape[1]
    index = torch.arange(length + -length % BLOCK, device=values.device).clamp_(max=length - 1)
    least, largest = values[:, index].view(len(values), -1, BLOCK).aminmax(dim=2)
    return (least[:, :, None], largest[:, :, None]) if rows else (least[:, None], largest[:, None])


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of each row of `blocks` bool [B, rows, columns] are True, and the columns sorted so that these
    come first; int32."""
    order = blocks[:, None].int().argsort(dim=-1, descending=True, stable=True)
    return blocks[:, None].sum(-1, dtype=torch.int32), order.int()


def dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool) -> Tensor:
    """Apply scaled_dot_product_attention to q [B, R, heads, D] and k and v [B, S, groups, D]; returns
    [B, R, heads, D]."""
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q.shape[2] > k.shape[2],
    )
    return mixed.transpose(1, 2)


def scores_bytes(scores: int, itemsize: int) -> int:
    """Return the bytes that dropping_product keeps of that many scores: the softmax in fp32, what is dropped of it, and
    the weights after that."""
    return (4 + 1 + itemsize) * scores


def dropping_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor, dropped: Tensor, rate: float
) -> Tensor:
    """Compute what dot_product does, with dropout after the softmax; shapes as there.

    rows int64 [R]: positions of the queries' tokens, which see earlier ones where there is no `mask`; dropped: bool
    [B, heads, R, S], a share `rate` of all weights.
    """
    shared = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is None:
        scores = scores.masked_fill(rows[:, None] < torch.arange(k.shape[2], device=rows.device), -torch.inf)
    else:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    mixed: Tensor = weights.masked_fill(dropped, 0.0) @ v
    return mixed.transpose(1, 2) * (1 / (1 - rate))


def block_sparse(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Apply flex_attention to q [B, R, heads, D] and k and v [B, S, groups, D]; returns [B, R, heads, D]."""
    # Without torch.compile, flex_attention would compute all scores. A compiled layer compiles it already.
    attend = _flex_attention if torch.compiler.is_compiling() else _compiled()
    mixed: Tensor = attend(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        enable_gqa=q.shape[2] > k.shape[2],
    )
    return mixed.transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_flex_attention, fullgraph=True, dynamic=False)
