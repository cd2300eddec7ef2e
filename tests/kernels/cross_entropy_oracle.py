"""Cross-entropy as its definition says, in fp64, with gradients by autograd, one token after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    """Inputs and options of one call."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    token_weight: Tensor
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    loss: Tensor
    nll_sum: Tensor
    count: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def block_of(case: Case, row: int, column: int) -> int:
    if (ids := case.options.get("block_ids")) is not None:
        return int(ids[row, column])
    if (ends := case.options.get("cu_seqlens")) is not None:
        token = row * case.labels.shape[1] + column
        return next(i for i in range(len(ends) - 1) if ends[i] <= token < ends[i + 1])
    return row


def oracle(case: Case) -> Result:
    option = case.options.get
    vocab = option("vocab_size") or case.weight.shape[0]
    cap, epsilon, zeta = (option(k, 0.0) for k in ("logit_softcap", "label_smoothing", "z_loss"))
    hidden = case.hidden.detach().double().requires_grad_()
    weight = case.weight.detach().to(case.hidden.dtype).double().requires_grad_()
    z = hidden @ weight[:vocab].t()
    if cap:
        z = cap * torch.tanh(z / cap)
    n_blocks = case.labels.shape[0]
    if option("cu_seqlens") is not None:
        n_blocks = len(case.options["cu_seqlens"]) - 1
    nll_sum = torch.zeros(option("num_blocks") or n_blocks, dtype=torch.float64)
    count = torch.zeros_like(nll_sum)
    loss = (hidden * 0).sum() + (weight * 0).sum()
    for b in range(z.shape[0]):
        for s in range(z.shape[1]):
            label, w = int(case.labels[b, s]), float(case.token_weight[b, s])
            if label == option("ignore_index", -100) or w == 0:
                continue
            log_p = torch.log_softmax(z[b, s], 0)
            log_z = torch.logsumexp(z[b, s], 0)
            smoothed = -(1 - epsilon) * log_p[label] - epsilon * log_p.mean()
            loss = loss + w * (smoothed + zeta * log_z**2)
            nll_sum[block_of(case, b, s)] -= log_p[label].detach()
            count[block_of(case, b, s)] += 1
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(loss.detach(), nll_sum, count, hidden.grad, weight.grad)


def make_case(
    rows: int = 3,
    length: int = 7,
    width: int = 8,
    vocab: int = 13,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    scale: float = 1.0,
    ignored: float = 0.2,
    masked: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random inputs; `ignored` and `masked` are the shares of tokens without a label or without weight."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * scale
    true_vocab = options.get("vocab_size") or vocab
    labels = torch.randint(0, true_vocab, (rows, length), generator=generator)
    draws = torch.rand(2, rows, length, generator=generator)
    labels[draws[0] < ignored] = options.get("ignore_index", -100)
    # Uneven weights around 1/23: a normaliser that is no power of two.
    token_weight = (0.5 + torch.rand(rows, length, generator=generator)) / 23
    token_weight[draws[1] < masked] = 0.0
    return Case(
        hidden.to(dtype), weight.to(weight_dtype or dtype), labels, token_weight.float(), options
    )
