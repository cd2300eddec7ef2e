"""Fused linear cross-entropy that also returns each block's negative log-likelihood.

    loss = Σ_n w_n · [(1−ε)·nll_n + ε·(lse_n − mean_v z_nv) + ζ·lse_n²],   nll_n = lse_n − z_n,label

with logits z = cap·tanh(hidden Wᵀ / cap) (plain hidden Wᵀ where cap = 0), label smoothing ε and z-loss weight ζ. The
weights w carry the normaliser, so the gradient is known up to one scalar when the forward ends:

    dz_nv = w_n · [p_nv · (1 + 2ζ·lse_n) − (1−ε)·[v = label] − ε/V] · (1 − (z_nv / cap)²)

Under tensor parallelism each rank holds rows of the output embedding. The ranks gather (max, label's logit, sum of
exponentials) of every token and merge them in rank order, so that all get the same bits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lfr.kernels.autograd import Call, LinearCrossEntropy, gather_hidden, weighted_sum
from megatron_lfr.kernels.blocks import sum_blocks
from megatron_lfr.kernels.input_checks import check_labels, check_options, check_tensors, check_working, choose_backend
from megatron_lfr.kernels.matmul import compute_dtype
from megatron_lfr.kernels.scoring import score
from megatron_lfr.kernels.softmax import Problem, describe_tokens, merge_ranks
from megatron_lfr.parallel.collectives import group_rank, group_size

Mode = Literal["auto", "save", "chunk", "score"]
Backend = Literal["auto", "torch", "triton"]

SAVE_BUDGET_BYTES = 2**30
"""Largest size of the local fp32 logits, in bytes, for which mode="auto" takes "save"."""

CHUNK_ROWS = 4096
"""Number of tokens whose logits mode="chunk" holds at a time."""

SCORE_BUFFER_BYTES = 2**28
"""Bytes of logits that mode="score" holds at a time."""


class BlockStats(NamedTuple):
    """The sum of each block's negative log-likelihoods (nats), and the number of tokens in the sum; fp32 [blocks]."""

    nll_sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def block_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    *,
    block_ids: Tensor | None = None,
    num_blocks: int | None = None,
    vocab_size: int | None = None,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_softcap: float = 0.0,
    ignore_index: int = -100,
    mode: Mode = "auto",
    chunk_rows: int = CHUNK_ROWS,
    score_buffer_bytes: int = SCORE_BUFFER_BYTES,
    backend: Backend = "auto",
) -> tuple[Tensor, BlockStats]:
    """Compute the weighted cross-entropy of `hidden` under the output embedding `weight`, and each block's part of it.

    hidden [B, S, H], or with its tokens in one dimension [B·S, H], in bf16, fp16 or fp32 (fp64: everything is computed
    in fp64); weight [V_l, H], this rank's rows, in hidden's dtype or fp32 (rounded to hidden's dtype for the products,
    its gradient stays fp32); labels [B, S] int64; token_weight [B, S] fp32, a constant: loss mask / valid tokens of the
    whole global step. With `sequence_parallel`, hidden is this rank's N / ranks of the N = B·S tokens, [N / ranks, H];
    all ranks' hidden states are gathered, and their gradient is summed and scattered.

    A block is a row of the batch, unless `block_ids` [B, S] int64 below `num_blocks` assigns each token to one.
    Statistics cover the tokens whose weight is not 0 and whose label is not `ignore_index`. They are the pure negative
    log-likelihood, whatever z-loss, smoothing and weights are, and are not differentiable. The loss is an fp32 scalar.
    All ranks of `tp_group` get the same bits, as do reruns.

    Logits of columns >= `vocab_size` (default: none) are masked. Modes: "save" keeps the local logits' gradient for
    the backward; "chunk" works on `chunk_rows` tokens at a time and computes gradients in the forward, so it holds
    dX and dW until the backward; "score" computes no gradient and holds at most `score_buffer_bytes` of logits at a
    time (below 16 MiB, "triton" stores none at all, but is slower); "auto" takes "score" where no gradient is required,
    "save" up to SAVE_BUDGET_BYTES of logits, else "chunk".

    Backends: "triton" runs on GPUs and in Triton's interpreter, "torch" anywhere; "auto" takes "triton" on a GPU except
    for fp64. Triton writes the logits' gradient into the memory of the logits.

    Raises ValueError for shapes, dtypes or options that do not fit, and on a CPU for labels outside [0, vocab_size) and
    block ids outside [0, num_blocks). On a GPU nothing is read back: a bad label gives an infinite loss, or ends the
    process where the environment variable MEGATRON_LFR_CHECK_LABELS is 1.
    """
    ranks = group_size(tp_group)
    check_tensors(hidden, weight, labels, token_weight, ranks if sequence_parallel else 1)
    vocab_size = weight.shape[0] * ranks if vocab_size is None else vocab_size
    check_options(vocab_size, weight.shape[0] * ranks, z_loss, label_smoothing, logit_softcap)
    check_working(mode, chunk_rows, score_buffer_bytes)
    check_labels(labels, ignore_index, vocab_size)
    shape = labels.shape
    labels, token_weight = labels.reshape(-1), token_weight.reshape(-1).to(compute_dtype(hidden))
    valid = (labels != ignore_index) & (token_weight != 0)
    token_weight = torch.where(valid, token_weight, 0.0)

    first_column = group_rank(tp_group) * weight.shape[0]
    problem = Problem(
        vocab_size=vocab_size,
        first_column=first_column,
        columns=min(max(vocab_size - first_column, 0), weight.shape[0]),
        group=tp_group if ranks > 1 else None,
        sequence_parallel=sequence_parallel and ranks > 1,
        z_loss=z_loss,
        smoothing=label_smoothing,
        softcap=logit_softcap,
    )
    logit_bytes = 4 * labels.numel() * weight.shape[0]
    keeps_logits = mode == "save" or (mode == "auto" and logit_bytes <= SAVE_BUDGET_BYTES)
    call = Call(
        problem=problem,
        backend=choose_backend(hidden, backend),
        chunk_rows=max(labels.numel(), 1) if keeps_logits else chunk_rows,
        keeps_logits=keeps_logits,
    )
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, labels, token_weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad) and mode != "score":
        loss, nll = LinearCrossEntropy.apply(*inputs, call)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            loss, nll = _score(*inputs, call, score_buffer_bytes)
    values = torch.stack((torch.where(valid, nll, 0.0), valid.to(nll.dtype)))
    return loss, BlockStats(*sum_blocks(values, shape, block_ids, num_blocks))


def _score(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, call: Call, buffer_bytes: int
) -> tuple[Tensor, Tensor]:
    """Compute (weighted loss, nll [N]) without a gradient."""
    problem = call.problem
    hidden, operand = gather_hidden(hidden, problem), weight.to(hidden.dtype)
    local = score(hidden, operand, labels, problem, call.backend, buffer_bytes)
    tokens = describe_tokens(merge_ranks(local, weight.shape[0], problem), problem)
    return weighted_sum(tokens.loss, token_weight), tokens.nll
