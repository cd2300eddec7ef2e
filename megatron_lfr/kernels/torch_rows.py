"""The passes over a chunk's logits in PyTorch: on CPUs, and what the Triton kernels are compared with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_lfr.kernels.matmul import matmul
from megatron_lfr.kernels.softmax import Coefficients, Problem, merge

SLICE_COLUMNS = 8192
"""Columns of the vocabulary that scoring holds the logits of."""


class TorchRows:
    """The logits [C, columns] of C tokens before their cap, in fp32 or fp64; their memory is written over."""

    def __init__(self, logits: Tensor, labels: Tensor, problem: Problem, wants_gradient: bool) -> None:
        self._logits, self._problem = logits, problem
        column = (labels - problem.first_column).unsqueeze(1)
        self._is_local = (column >= 0) & (column < problem.columns)
        self._column = column.masked_fill(~self._is_local, 0)
        self._slope: Tensor | None = None
        if problem.softcap:
            logits.div_(problem.softcap).tanh_()
            if wants_gradient:
                self._slope = 1.0 - logits.square()
            logits.mul_(problem.softcap)
        logits[:, problem.columns :].fill_(-torch.inf)

    def statistics(self) -> Tensor:
        """See softmax: [3 or 4, C]. Leaves exp(logit − maximum) in the logits' place."""
        logits = self._logits
        # A shard of padding alone has only −inf: a finite maximum keeps −inf − maximum from becoming NaN.
        self._top = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
        target = logits.gather(1, self._column).masked_fill(~self._is_local, -torch.inf)
        logits.sub_(self._top)
        remainder = [logits[:, : self._problem.columns].sum(1, keepdim=True)] if self._problem.smoothing else []
        total = logits.exp_().sum(1, keepdim=True)
        return torch.cat([self._top, target, total, *remainder], 1).t()

    def gradient(self, coefficients: Coefficients) -> Tensor:
        """The logits' gradient [C, columns], after `statistics`, in the logits' place."""
        scale, top, uniform, at_label = (value.unsqueeze(1) for value in coefficients)
        gradient = self._logits.mul_(scale * (self._top - top).exp())
        if self._problem.smoothing:
            gradient[:, : self._problem.columns].sub_(uniform)
        gradient.scatter_(1, self._column, torch.where(self._is_local, at_label, gradient.gather(1, self._column)))
        if self._slope is not None:
            gradient.mul_(self._slope)
        gradient[coefficients.scale == 0] = 0.0  # also where 0 times an overflow is no number
        return gradient


def score(hidden: Tensor, weight: Tensor, labels: Tensor, problem: Problem, chunk_rows: int) -> Tensor:
    """Statistics [3 or 4, N] over this rank's columns, from hidden [N, H] and weight [V_l, H]; holds the logits of
    `chunk_rows` tokens and SLICE_COLUMNS columns at a time."""
    chunks = zip(torch.split(hidden, chunk_rows), torch.split(labels, chunk_rows), strict=True)
    return torch.cat([_score_chunk(*chunk, weight, problem) for chunk in chunks], 1)


def _score_chunk(hidden: Tensor, labels: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    parts = []
    for start in range(0, weight.shape[0], SLICE_COLUMNS):
        piece = weight[start : start + SLICE_COLUMNS]
        columns = min(max(problem.columns - start, 0), len(piece))
        part = replace(problem, first_column=problem.first_column + start, columns=columns)
        parts.append(TorchRows(matmul(hidden, piece.t()), labels, part, wants_gradient=False).statistics())
    return merge(torch.stack(parts), SLICE_COLUMNS, problem.columns)
