"""Statistics of the logits without a gradient, in memory that does not grow with tokens times vocabulary.

The logits go through a buffer, SLICE_COLUMNS columns of some tokens at a time: a matrix product into it, and one pass
over it. Where the buffer may hold fewer than FUSED_BELOW_ROWS tokens, the products would be too small to be fast;
Triton's backend then fuses product and pass, and stores no logits at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megatron_lfr.kernels.matmul import compute_dtype, matmul
from megatron_lfr.kernels.softmax import Problem, merge
from megatron_lfr.kernels.torch_rows import TorchRows

if TYPE_CHECKING:
    from megatron_lfr.kernels.triton_rows import TritonRows

SLICE_COLUMNS = 8192
"""Columns of the vocabulary that the buffer holds the logits of."""

FUSED_BELOW_ROWS = 512
"""Tokens that the buffer must have room for."""


def score(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    problem: Problem,
    backend: Literal["torch", "triton"],
    buffer_bytes: int,
) -> Tensor:
    """Statistics [3 or 4, N] over this rank's columns, from hidden [N, H] and weight [V_l, H] in one dtype."""
    rows = buffer_bytes // (SLICE_COLUMNS * compute_dtype(hidden).itemsize)
    if backend == "triton" and rows < FUSED_BELOW_ROWS:
        from megatron_lfr.kernels import triton_rows

        return triton_rows.score_fused(hidden, weight, labels, problem)
    chunks = zip(torch.split(hidden, max(rows, 1)), torch.split(labels, max(rows, 1)), strict=True)
    return torch.cat([_score_rows(*chunk, weight, problem, backend) for chunk in chunks], 1)


def _score_rows(hidden: Tensor, labels: Tensor, weight: Tensor, problem: Problem, backend: str) -> Tensor:
    parts = []
    for start in range(0, max(problem.columns, 1), SLICE_COLUMNS):
        piece = weight[start : start + SLICE_COLUMNS]
        columns = min(max(problem.columns - start, 0), len(piece))
        part = replace(problem, first_column=problem.first_column + start, columns=columns)
        # Nothing else holds the logits: the next slice's take their memory.
        parts.append(_passes(matmul(hidden, piece.t()), labels, part, backend).statistics())
    return merge(torch.stack(parts), SLICE_COLUMNS, problem.columns)


def _passes(logits: Tensor, labels: Tensor, problem: Problem, backend: str) -> TorchRows | TritonRows:
    if backend == "torch":
        return TorchRows(logits, labels, problem, wants_gradient=False)
    from megatron_lfr.kernels.triton_rows import TritonRows

    return TritonRows(logits, labels, problem, logits.dtype)
