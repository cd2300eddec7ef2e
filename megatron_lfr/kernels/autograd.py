"""The cross-entropy as an autograd function: the whole gradient, up to the upstream scalar, is known when the forward
ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lfr.kernels.matmul import add_matmul, compute_dtype, matmul
from megatron_lfr.kernels.softmax import Problem, Tokens, describe_tokens, differentiate, merge_ranks
from megatron_lfr.kernels.torch_rows import TorchRows
from megatron_lfr.parallel.collectives import all_gather_rows, start_all_reduce, start_reduce_scatter


@dataclass(frozen=True)
class Call:
    """How a problem is computed."""

    problem: Problem
    backend: Literal["torch", "triton"]
    chunk_rows: int
    keeps_logits: bool
    """Whether the logits' gradient is kept for the backward (save), instead of being used chunk by chunk in the forward
    (chunk)."""

    def product_dtype(self, hidden: torch.dtype, weight: torch.dtype) -> torch.dtype | None:
        """Return the dtype of the product that gives the weight's gradient, before the upstream scalar; None leaves the
        dtype of its sum. It is bf16 where both operands are, which saves a pass over the largest of all gradients.
        fp16's range is too small before the scalar is applied, and the PyTorch backend rounds only what it returns."""
        return weight if self.backend == "triton" and hidden == weight == torch.bfloat16 else None


class LinearCrossEntropy(torch.autograd.Function):
    """Maps hidden [N, H] (on a sequence-parallel rank [N / ranks, H]), weight [V_l, H], labels [N] and token_weight [N]
    to the weighted loss [] and nll [N]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        hidden = gather_hidden(hidden, call.problem)
        unit = _unit(token_weight, hidden.dtype)
        loss, nll, saved = _forward(hidden, weight, labels, token_weight, unit, call, ctx.needs_input_grad[:2])
        ctx.save_for_backward(unit, *saved)
        ctx.call, ctx.dtypes = call, (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(nll)
        ctx.set_materialize_grads(False)
        return weighted_sum(loss, token_weight), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if grad_loss is None:
            return None, None, None, None, None
        (wants_hidden, wants_weight), (hidden_dtype, weight_dtype) = ctx.needs_input_grad[:2], ctx.dtypes
        unit, *saved = ctx.saved_tensors
        if ctx.call.keeps_logits:
            hidden, weight, d_logits = saved
            part = matmul(d_logits, weight.to(hidden_dtype)) if wants_hidden else None
            summed = _start_sum(part, ctx.call.problem)
            dtype = ctx.call.product_dtype(hidden_dtype, weight_dtype)
            d_weight = matmul(d_logits.t(), hidden, dtype) if wants_weight else None  # while the parts are summed
        else:
            part, d_weight = saved
            summed = _start_sum(part, ctx.call.problem)
        scale = grad_loss * unit
        d_weight = _scaled(d_weight, scale, weight_dtype, ctx.call)
        return _scaled(summed(), scale, hidden_dtype, ctx.call), d_weight, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    unit: Tensor,
    call: Call,
    needs_gradient: tuple[bool, bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return (losses [N], nll [N], what the backward needs), with gradients divided by `unit`. `needs_gradient`: of
    hidden, of weight."""
    operand, in_units = weight.to(hidden.dtype), token_weight / unit
    d_hidden, d_weight = None, None
    if needs_gradient[0] and not call.keeps_logits:
        # Where other ranks' parts are added, the gradient is rounded after the sum.
        dtype = hidden.dtype if call.problem.group is None else compute_dtype(hidden)
        d_hidden = torch.empty_like(hidden, dtype=dtype)
    kept: list[Tensor | None] = []

    def use_gradient(rows: slice, d_logits: Tensor) -> None:
        nonlocal d_weight
        if call.keeps_logits:
            kept.append(d_logits)
            return
        if d_hidden is not None:
            d_hidden[rows] = matmul(d_logits, operand)
        if needs_gradient[1]:
            d_weight = add_matmul(d_weight, d_logits.t(), hidden[rows])

    chunks = []
    for start in range(0, max(len(labels), 1), call.chunk_rows):
        rows = slice(start, start + call.chunk_rows)
        chunks.append(_chunk(rows, hidden, operand, labels, in_units, call, use_gradient))
    loss, nll = (torch.cat([getattr(tokens, name) for tokens in chunks]) for name in ("loss", "nll"))
    return loss, nll, [hidden, weight, *kept] if call.keeps_logits else [d_hidden, d_weight]


def _chunk(
    rows: slice,
    hidden: Tensor,
    operand: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    call: Call,
    use_gradient: Callable[[slice, Tensor], None],
) -> Tokens:
    """Compute the tokens of `rows`, and give their logits' gradient to `use_gradient`. The logits are freed afterwards,
    before the next chunk's are allocated."""
    logits = matmul(hidden[rows], operand.t())
    if call.backend == "triton":
        from megatron_lfr.kernels.triton_rows import TritonRows

        passes: TorchRows | TritonRows = TritonRows(logits, labels[rows], call.problem, hidden.dtype)
    else:
        passes = TorchRows(logits, labels[rows], call.problem, wants_gradient=True)
    tokens = describe_tokens(merge_ranks(passes.statistics(), logits.shape[1], call.problem), call.problem)
    d_logits = passes.gradient(differentiate(tokens, token_weight[rows], call.problem))
    # A GPU multiplies in hidden's dtype; on a CPU nothing is rounded below fp32.
    use_gradient(rows, d_logits.to(hidden.dtype) if hidden.is_cuda else d_logits)
    return tokens


def gather_hidden(hidden: Tensor, problem: Problem) -> Tensor:
    """Return the hidden states of all tokens [N, H], gathered from the ranks under sequence parallelism."""
    return all_gather_rows(hidden, problem.group) if problem.sequence_parallel else hidden


def weighted_sum(loss: Tensor, token_weight: Tensor) -> Tensor:
    """Sum the tokens' weighted losses [N] to a scalar. A token's loss may be anything where its weight is 0."""
    weighted = torch.where(token_weight != 0, loss * token_weight, 0.0)
    return weighted.sum(dtype=torch.float64).to(loss.dtype)


def _unit(token_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the logits' gradients are divided by while they are held in `dtype`. In fp16 it is a power of two
    that brings the largest token weight near 256, so that the tails of the softmax do not underflow and a z-loss does
    not overflow; in other dtypes it is 1."""
    if dtype != torch.float16 or not token_weight.numel():
        return token_weight.new_ones(())
    _, exponent = torch.frexp(token_weight.abs().amax().clamp(min=torch.finfo(torch.float32).tiny))
    return torch.ldexp(token_weight.new_ones(()), exponent - 8)


def _start_sum(part: Tensor | None, problem: Problem) -> Callable[[], Tensor | None]:
    """Begin to sum the ranks' parts of hidden's gradient."""
    if part is None:
        return lambda: None
    return (
        start_reduce_scatter(part, problem.group)
        if problem.sequence_parallel
        else start_all_reduce(part, problem.group)
    )


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype, call: Call) -> Tensor | None:
    """Multiply the gradient by `scale`, in `dtype`; in the gradient's own memory where nothing else refers to it."""
    if gradient is None:
        return None
    if gradient.dtype == dtype and call.keeps_logits and call.backend == "triton":
        from megatron_lfr.kernels import triton_rows

        return triton_rows.scale_in_place(gradient, scale)
    wide = gradient.to(compute_dtype(gradient))  # or the scale would be rounded to the gradient's dtype
    return torch.mul(wide, scale, out=torch.empty_like(gradient, dtype=dtype))
