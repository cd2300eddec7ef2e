"""The passes over a chunk's logits in PyTorch, for CPUs and as the reference for the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lfr.kernels.softmax import Coefficients, Problem


class TorchRows:
    """Passes over the logits [C, columns] of C tokens, given before the cap in fp32 or fp64. They overwrite the
    logits."""

    def __init__(self, logits: Tensor, labels: Tensor, problem: Problem, wants_gradient: bool) -> None:
        self._logits, self._problem = logits, problem
        column = (labels - problem.first_column).unsqueeze(1)
        self._is_local = (column >= 0) & (column < problem.columns)
        self._column = column.masked_fill(~self._is_local, 0)
        self._slope: Tensor | None = None
        if problem.softcap:
            logits.div_(problem.softcap).tanh_()
            if wants_gradient:
                self._slope = logits.square().neg_().add_(1.0)
            logits.mul_(problem.softcap)
        logits[:, problem.columns :].fill_(-torch.inf)

    def statistics(self) -> Tensor:
        """Compute the statistics [3 or 4, C] that softmax.py defines. The logits become exp(logit − maximum)."""
        logits = self._logits
        # A shard of padding alone has only −inf: a finite maximum keeps −inf − maximum from becoming NaN.
        self._top = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
        target = logits.gather(1, self._column).masked_fill(~self._is_local, -torch.inf)
        logits.sub_(self._top)
        remainder = [logits[:, : self._problem.columns].sum(1, keepdim=True)] if self._problem.smoothing else []
        total = logits.exp_().sum(1, keepdim=True)
        return torch.cat([self._top, target, total, *remainder], 1).t()

    def gradient(self, coefficients: Coefficients) -> Tensor:
        """Compute the logits' gradient [C, columns] in the memory of the logits; `statistics` must have run before."""
        scale, top, uniform, at_label = (value.unsqueeze(1) for value in coefficients)
        gradient = self._logits.mul_(scale * (self._top - top).exp())
        if self._problem.smoothing:
            gradient[:, : self._problem.columns].sub_(uniform)
        gradient.scatter_(1, self._column, torch.where(self._is_local, at_label, gradient.gather(1, self._column)))
        if self._slope is not None:
            gradient.mul_(self._slope)
        gradient[coefficients.scale == 0] = 0.0  # 0 times an overflow would be NaN
        return gradient
