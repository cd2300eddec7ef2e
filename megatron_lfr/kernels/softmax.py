"""What a cross-entropy needs to know of each token's softmax, merged from parts of the vocabulary.

A part's statistics are fp32 [3, C] for C tokens: the largest logit m, the label's logit t (−inf where the label is not
among the part's columns), and s = Σ exp(z − m); where labels are smoothed [4, C], with r = Σ (z − m). Parts are slices
of one rank's columns, or the ranks of a tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lfr.parallel.collectives import all_gather_stacked


@dataclass(frozen=True)
class Problem:
    """All arguments of a call except its tensors."""

    vocab_size: int
    first_column: int
    """Token id of this rank's first row of the weight."""
    columns: int
    """Number of this rank's rows that are not padding."""
    group: ProcessGroup | None
    sequence_parallel: bool
    z_loss: float
    smoothing: float
    softcap: float


class Tokens(NamedTuple):
    """Losses of C tokens and terms of their gradients, over the whole vocabulary; [C] each."""

    nll: Tensor
    loss: Tensor
    """Loss with smoothing and z-loss, before the token's weight."""
    top: Tensor
    total: Tensor
    """Σ exp(z − top)."""
    growth: Tensor
    """1 + 2ζ·lse, by which the z-loss multiplies the softmax in the gradient."""


class Coefficients(NamedTuple):
    """Terms of the gradient of C tokens' logits: it is scale · exp(z − top) − uniform, but at_label for the label's
    logit; [C] each."""

    scale: Tensor
    top: Tensor
    uniform: Tensor
    at_label: Tensor


def merge(parts: Tensor, width: int, columns: int) -> Tensor:
    """Merge the statistics [parts, 3 or 4, C] of parts of `width` columns each into [3 or 4, C]. Only the first
    `columns` of all parts' columns are not padding. Every rank gets the same bits."""
    if len(parts) == 1:
        return parts[0]
    tops, targets, sums, *remainders = parts.unbind(1)
    top = tops.amax(0)
    shift = tops - top
    merged = [top, targets.amax(0), (sums * shift.exp()).sum(0)]
    if remainders:
        counts = (columns - width * torch.arange(len(parts), device=parts.device)).clamp(0, width)
        merged.append((remainders[0] + counts.unsqueeze(1) * shift).sum(0))
    return torch.stack(merged)


def merge_ranks(statistics: Tensor, width: int, problem: Problem) -> Tensor:
    """Merge this rank's statistics, of `width` columns including padding, with all ranks' over the whole vocabulary."""
    return merge(all_gather_stacked(statistics, problem.group), width, problem.vocab_size)


def describe_tokens(statistics: Tensor, problem: Problem) -> Tokens:
    """Derive losses and gradient terms from the statistics over the whole vocabulary [3 or 4, C]."""
    top, target, total, *remainder = statistics.unbind(0)
    log_total = total.log()
    # Differences first: near ±1000 the rounding of a maximum must not enter the loss.
    nll = (top - target) + log_total
    lse = top + log_total
    loss = nll
    if problem.smoothing:
        smooth = log_total - remainder[0] / problem.vocab_size  # lse − mean logit
        loss = (1.0 - problem.smoothing) * loss + problem.smoothing * smooth
    if problem.z_loss:
        loss = loss + problem.z_loss * lse.square()
    return Tokens(nll, loss, top, total, 1.0 + 2.0 * problem.z_loss * lse)


def differentiate(tokens: Tokens, token_weight: Tensor, problem: Problem) -> Coefficients:
    """Derive the gradient of Σ token_weight · loss; it is 0 for tokens of weight 0, whatever their logits are."""
    growth, uniform = tokens.growth, problem.smoothing / problem.vocab_size
    # p − 1 as expm1(−nll): a confident token's gradient is not lost in the subtraction.
    at_label = torch.expm1(-tokens.nll) * growth + (growth - 1.0) + problem.smoothing - uniform
    used = token_weight != 0
    return Coefficients(
        scale=torch.where(used, token_weight * growth / tokens.total, 0.0),
        top=tokens.top,
        uniform=token_weight * uniform,
        at_label=torch.where(used, token_weight * at_label, 0.0),
    )
