"""Statistics of the logits without a gradient, in memory that does not grow with tokens times vocabulary.

The logits go through a buffer, SLICE_COLUMNS columns of some tokens at a time: a matrix product fills it, and one pass
reads it. Where the buffer may hold fewer than FUSED_BELOW_ROWS tokens, the products would be too small to be fast; the
Triton backend then fuses product and pass, and stores no logits at all.
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
"""Number of columns of the vocabulary in the buffer."""

FUSED_BELOW_ROWS = 512
"""Smallest number of tokens in the buffer for which it is used on the Triton backend."""


def score(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    problem: Problem,
    backend: Literal["torch", "triton"],
    buffer_bytes: int,
) -> Tensor:
    """Compute the statistics [3 or 4, N] over this rank's columns, from hidden [N, H] and weight [V_l, H] of one
    dtype."""
    rows = buffer_bytes // (SLICE_COLUMNS * compute_dtype(hidden).itemsize)
    if backend == "triton" and rows < FUSED_BELOW_ROWS:
        from megatron_lfr.kernels import triton_rows

        return triton_rows.score_fused(hidden, weight, labels, problem)
    chunks = zip(torch.split(hidden, max(rows, 1)), torch.split(labels, max(rows, 1)), strict=True)
    return torch.cat([_score_rows(*chunk, weight, problem, backend) for chunk in chunks], 1)


def _score_rows(hidden: Tensor, labels: Tensor, weight: Tensor, problem: Problem, backend: str) -> Tensor:
    parts = []
    for start in range(0, max(problem.columns, 1), SLICE_COLUMNS):
        weight_slice = weight[start : start + SLICE_COLUMNS]
        columns = min(max(problem.columns - start, 0), len(weight_slice))
        part = replace(problem, first_column=problem.first_column + start, columns=columns)
        # Nothing else refers to the logits, so the next slice's logits reuse their memory.
        parts.append(_passes(matmul(hidden, weight_slice.t()), labels, part, backend).statistics())
    return merge(torch.stack(parts), SLICE_COLUMNS, problem.columns)


def _passes(logits: Tensor, labels: Tensor, problem: Problem, backend: str) -> TorchRows | TritonRows:
    if backend == "torch":
        return TorchRows(logits, labels, problem, wants_gradient=False)
    from megatron_lfr.kernels.triton_rows import TritonRows

    return TritonRows(logits, labels, problem, logits.dtype)
