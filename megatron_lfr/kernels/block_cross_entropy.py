"""Fused linear cross-entropy that also returns each block's negative log-likelihood.

    loss = Σ_n w_n · [(1−ε)·nll_n + ε·(lse_n − mean_v z_nv) + ζ·lse_n²],   nll_n = lse_n − z_n,label

with logits z = cap·tanh(hidden Wᵀ / cap) (plain hidden Wᵀ where cap = 0), label smoothing ε and z-loss weight ζ. The
weights w carry the normaliser, so the gradient is known up to one scalar when the forward ends:

    dz_nv = w_n · [p_nv · (1 + 2ζ·lse_n) − (1−ε)·[v = label] − ε/V] · (1 − (z_nv / cap)²)

Under tensor parallelism each rank holds rows of the output embedding. The ranks gather (max, sum of exponentials,
label's logit) of every token and merge them in rank order, so that all get the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_lfr.kernels.blocks import sum_blocks
from megatron_lfr.kernels.input_checks import check_labels, check_options, check_tensors, compute_dtype
from megatron_lfr.parallel.collectives import all_gather_stacked, all_reduce_sum, group_rank, group_size

Mode = Literal["auto", "save", "chunk", "score"]

SAVE_BUDGET_BYTES = 2**30
"""mode="auto" keeps the local fp32 logits while they take no more than this."""


class BlockStats(NamedTuple):
    """Per block: the sum of its tokens' negative log-likelihoods (nats) and their number, fp32 [blocks]."""

    nll_sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


@dataclass(frozen=True)
class _Problem:
    """Everything but the tensors."""

    vocab_size: int
    first_column: int
    """Token id of this rank's first row of the weight."""
    columns: int
    """This rank's rows that are no padding."""
    group: ProcessGroup | None
    sums_hidden_grad: bool
    z_loss: float
    smoothing: float
    softcap: float
    chunk_rows: int
    keeps_logits: bool
    """Gradients of the logits are kept for the backward (save), or used chunk by chunk in the forward (chunk)."""


class _Tokens(NamedTuple):
    """Statistics of the tokens of a chunk, merged over the ranks. [C] each."""

    nll: Tensor
    lse: Tensor
    smooth: Tensor | None
    """lse − mean logit, where labels are smoothed."""
    local_scale: Tensor
    """Softmax = this rank's exponentials · local_scale."""


def block_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    *,
    block_ids: Tensor | None = None,
    num_blocks: int | None = None,
    cu_seqlens: Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: ProcessGroup | None = None,
    sum_hidden_grad: bool = True,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_softcap: float = 0.0,
    ignore_index: int = -100,
    mode: Mode = "auto",
    chunk_rows: int = 2048,
) -> tuple[Tensor, BlockStats]:
    """Weighted cross-entropy of `hidden` under the output embedding `weight`, and each block's share of it.

    hidden [B, S, H] (batch first) in bf16, fp16 or fp32 (fp64: everything is computed in fp64); weight [V_l, H], this
    rank's rows, in hidden's dtype or fp32 (rounded to hidden's dtype for the products, its gradient stays fp32);
    labels [B, S] int64; token_weight [B, S] fp32, a constant: loss mask / valid tokens of the whole global step.

    Blocks are the rows of the batch, or as `block_ids` [B, S] int64 below `num_blocks` says, or the pieces
    [cu_seqlens[i], cu_seqlens[i+1]) of the flattened batch. Statistics cover the tokens whose weight is not 0 and
    whose label is not `ignore_index`: pure negative log-likelihood, whatever z-loss, smoothing and weights are. They
    are not differentiable. The loss is an fp32 scalar. All ranks of `tp_group` get the same bits, as do reruns.
    Without `sum_hidden_grad`, each of them gets its own part of hidden's gradient: under sequence parallelism, what
    gathered `hidden` sums and scatters it in one collective.

    Logits of columns >= `vocab_size` (default: none) are masked. Modes: "save" keeps the local logits' gradient for
    the backward; "chunk" works on `chunk_rows` tokens at a time and computes gradients in the forward, so it holds
    dX and dW until the backward; "score" computes no gradient; "auto" takes "score" where none is asked for, "save"
    up to SAVE_BUDGET_BYTES of logits, else "chunk". `logit_softcap` needs a second tensor of the logits' size.

    ValueError: shapes, dtypes or options that do not fit; on a CPU, labels outside [0, vocab_size) and block ids or
    cu_seqlens that are no partition. On a GPU nothing is read back: a bad label gives an infinite loss, or ends
    the process where the environment variable MEGATRON_LFR_CHECK_LABELS is 1.
    """
    ranks = group_size(tp_group)
    check_tensors(hidden, weight, labels, token_weight)
    vocab_size = weight.shape[0] * ranks if vocab_size is None else vocab_size
    check_options(vocab_size, weight.shape[0] * ranks, z_loss, label_smoothing, logit_softcap, mode, chunk_rows)
    check_labels(labels, ignore_index, vocab_size)
    labels, token_weight = labels.reshape(-1), token_weight.reshape(-1)
    valid = (labels != ignore_index) & (token_weight != 0)
    token_weight = torch.where(valid, token_weight, 0.0)

    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad) and mode != "score"
    keeps_logits = mode == "save" or (
        mode == "auto" and wants_grad and 4 * labels.numel() * weight.shape[0] <= SAVE_BUDGET_BYTES
    )
    first_column = group_rank(tp_group) * weight.shape[0]
    problem = _Problem(
        vocab_size=vocab_size,
        first_column=first_column,
        columns=min(max(vocab_size - first_column, 0), weight.shape[0]),
        group=tp_group,
        sums_hidden_grad=sum_hidden_grad,
        z_loss=z_loss,
        smoothing=label_smoothing,
        softcap=logit_softcap,
        chunk_rows=max(labels.numel(), 1) if keeps_logits else chunk_rows,
        keeps_logits=keeps_logits,
    )
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, labels, token_weight)
    if wants_grad:
        loss, nll = _BlockCrossEntropy.apply(*inputs, problem)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            loss, nll = _forward(*inputs, problem, None)
    nll = torch.where(valid, nll, 0.0)
    rows = hidden.shape[:2]
    block_nll, block_count = sum_blocks(nll, valid.to(nll.dtype), rows, block_ids, num_blocks, cu_seqlens)
    return loss, BlockStats(block_nll, block_count)


class _BlockCrossEntropy(torch.autograd.Function):
    """All gradients but for the upstream scalar, which the backward multiplies in."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, problem: _Problem
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(hidden, weight, problem, ctx.needs_input_grad[:2])
        loss, nll = _forward(hidden, weight, labels, token_weight, problem, gradients)
        ctx.save_for_backward(hidden, weight, *gradients.kept())
        ctx.problem = problem
        ctx.mark_non_differentiable(nll)
        ctx.set_materialize_grads(False)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if grad_loss is None:
            return None, None, None, None, None
        hidden, weight, *kept = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, ctx.problem, ctx.needs_input_grad[:2], kept)
        d_hidden, d_weight = gradients.finish(grad_loss)
        return d_hidden, d_weight, None, None, None


class _Gradients:
    """dX and dW: from the kept gradient of all logits (save), or summed up chunk by chunk (chunk)."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        problem: _Problem,
        needed: tuple[bool, ...],
        kept: list[Tensor] | None = None,
    ) -> None:
        self.hidden, self.weight, self.problem = hidden, weight, problem
        self.wants_hidden, self.wants_weight = needed
        self.d_logits: Tensor | None = None
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        if kept is None:
            if not problem.keeps_logits:
                self.d_hidden = torch.empty_like(hidden) if self.wants_hidden else None
                self.d_weight = torch.zeros_like(weight, dtype=compute_dtype(hidden)) if self.wants_weight else None
        elif problem.keeps_logits:
            (self.d_logits,) = kept
        else:
            parts = iter(kept)
            self.d_hidden = next(parts) if self.wants_hidden else None
            self.d_weight = next(parts) if self.wants_weight else None

    def kept(self) -> list[Tensor]:
        return [t for t in (self.d_logits, self.d_hidden, self.d_weight) if t is not None]

    def add(self, rows: slice, d_logits: Tensor) -> None:
        """Take the gradient of the logits of `rows` [C, V_l]."""
        d_logits = d_logits.to(_operand_dtype(self.hidden))
        if self.problem.keeps_logits:
            self.d_logits = d_logits
            return
        if self.d_hidden is not None:
            self.d_hidden[rows] = self._hidden_part(d_logits)
        if self.d_weight is not None:
            self.d_weight += _matmul(d_logits.t(), self.hidden[rows])

    def finish(self, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """dX and dW times the upstream gradient, in the dtypes of hidden and weight."""
        if self.d_logits is not None:
            d_hidden = self._hidden_part(self.d_logits) if self.wants_hidden else None
            d_weight = _matmul(self.d_logits.t(), self.hidden) if self.wants_weight else None
        else:
            d_hidden, d_weight = self.d_hidden, self.d_weight
        return (
            None if d_hidden is None else (d_hidden * scale).to(self.hidden.dtype),
            None if d_weight is None else (d_weight * scale).to(self.weight.dtype),
        )

    def _hidden_part(self, d_logits: Tensor) -> Tensor:
        part = _matmul(d_logits, self.weight.to(self.hidden.dtype))
        return all_reduce_sum(part, self.problem.group) if self.problem.sums_hidden_grad else part


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    problem: _Problem,
    gradients: _Gradients | None,
) -> tuple[Tensor, Tensor]:
    """(loss, nll [N]); the gradients, if wanted, go into `gradients`. hidden [N, H], labels and token_weight [N]."""
    weight = weight.to(hidden.dtype)
    losses, nlls = [], []
    for start in range(0, max(len(labels), 1), problem.chunk_rows):
        rows = slice(start, start + problem.chunk_rows)
        logits = _matmul(hidden[rows], weight.t())
        slope = _softcap(logits, problem, gradients is not None)
        column, is_local = _label_columns(labels[rows], problem, weight.shape[0])
        tokens = _exponentiate(logits, column, is_local, problem)
        w = token_weight[rows].to(logits.dtype)
        losses.append(_token_losses(tokens, w, problem))
        nlls.append(tokens.nll)
        if gradients is not None:
            _differentiate(logits, slope, column, is_local, tokens, w, problem)
            gradients.add(rows, logits)
    loss = torch.cat(losses).sum(dtype=torch.float64)
    return loss.to(compute_dtype(hidden)), torch.cat(nlls)


def _softcap(logits: Tensor, problem: _Problem, wants_slope: bool) -> Tensor | None:
    """Cap the logits in place, mask the padding, and return the cap's derivative where it is wanted."""
    slope = None
    if problem.softcap:
        logits.div_(problem.softcap).tanh_()
        if wants_slope:
            slope = 1.0 - logits.square()
        logits.mul_(problem.softcap)
    logits[:, problem.columns :].fill_(-torch.inf)
    return slope


def _label_columns(labels: Tensor, problem: _Problem, width: int) -> tuple[Tensor, Tensor]:
    """(column [C, 1] of each label in this rank's logits, 0 where it is not there; whether it is there [C, 1])."""
    column = (labels - problem.first_column).unsqueeze(1)
    is_local = (column >= 0) & (column < min(problem.columns, width))
    return column.masked_fill(~is_local, 0), is_local


def _exponentiate(logits: Tensor, column: Tensor, is_local: Tensor, problem: _Problem) -> _Tokens:
    """Turn the logits [C, V_l] into exp(logit − local maximum), in place, and merge the ranks' statistics."""
    # A shard of padding alone has only −inf: a finite maximum keeps −inf − maximum from becoming NaN.
    top = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    target = logits.gather(1, column).masked_fill(~is_local, -torch.inf)
    logits.sub_(top)
    parts = [top, target]
    if problem.smoothing:
        parts.append(logits[:, : problem.columns].sum(1, keepdim=True))
    parts.append(logits.exp_().sum(1, keepdim=True))
    packed = torch.cat(parts, 1).t()
    tops, targets, *shifted_sums, sums = all_gather_stacked(packed, problem.group).unbind(1)  # [ranks, C] each

    top_all = tops.amax(0)
    total, shifted_sum = torch.zeros_like(top_all), torch.zeros_like(top_all)
    for rank in range(len(tops)):  # in rank order, so that every rank rounds alike
        shift = tops[rank] - top_all
        total += sums[rank] * shift.exp()
        if problem.smoothing:
            columns = min(max(problem.vocab_size - rank * logits.shape[1], 0), logits.shape[1])
            shifted_sum += shifted_sums[0][rank] + columns * shift
    log_total = total.log()
    # Differences first: near ±1000 the rounding of a maximum must not enter the loss.
    nll = (top_all - targets.amax(0)) + log_total
    smooth = log_total - shifted_sum / problem.vocab_size if problem.smoothing else None
    return _Tokens(nll, top_all + log_total, smooth, (top.squeeze(1) - top_all).exp() / total)


def _token_losses(tokens: _Tokens, w: Tensor, problem: _Problem) -> Tensor:
    """Weighted losses [C]; 0 where the weight is."""
    loss = tokens.nll
    if tokens.smooth is not None:
        loss = (1.0 - problem.smoothing) * loss + problem.smoothing * tokens.smooth
    if problem.z_loss:
        loss = loss + problem.z_loss * tokens.lse.square()
    return torch.where(w != 0, loss * w, 0.0)


def _differentiate(
    exponentials: Tensor,
    slope: Tensor | None,
    column: Tensor,
    is_local: Tensor,
    tokens: _Tokens,
    w: Tensor,
    problem: _Problem,
) -> None:
    """Turn the exponentials [C, V_l] into the gradient of the logits, in place."""
    grow = 1.0 + 2.0 * problem.z_loss * tokens.lse
    d_logits = exponentials.mul_((w * grow * tokens.local_scale).unsqueeze(1))
    uniform = problem.smoothing / problem.vocab_size
    if uniform:
        d_logits[:, : problem.columns].sub_((w * uniform).unsqueeze(1))
    # p − 1 as expm1(−nll): a confident token's gradient is not lost in the subtraction.
    at_label = torch.expm1(-tokens.nll) * grow + (grow - 1.0) + problem.smoothing - uniform
    at_label = torch.where(w != 0, w * at_label, 0.0).unsqueeze(1)
    d_logits.scatter_(1, column, torch.where(is_local, at_label, d_logits.gather(1, column)))
    if slope is not None:
        d_logits.mul_(slope)


def _operand_dtype(hidden: Tensor) -> torch.dtype:
    """dtype of the logits' gradient in the matrix products: hidden's on a GPU, never below fp32 on a CPU."""
    return hidden.dtype if hidden.is_cuda else compute_dtype(hidden)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, summed and returned in fp32 (fp64 for fp64)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return torch.mm(a.to(dtype), b.to(dtype))
