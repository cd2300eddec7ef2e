"""Cross-entropy as its definition says, in fp64, with gradients by autograd, one token after the other; and cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lfr.kernels import BlockStats, block_cross_entropy

PATHS = ["auto", "save", "chunk", "save/triton", "chunk/triton"]
"""Ways to a gradient: mode, and backend where it is not PyTorch's."""
SCORE_PATHS = ["score", "score/triton", "score/triton/fused"]

BOUND = 2e-6
"""Relative error that fp32 computations are allowed."""


@dataclass
class Case:
    """Inputs and options of one call."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    token_weight: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    channels: slice = field(default_factory=lambda: slice(None))
    """Channels of the gradient of hidden that are well conditioned."""


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
    nll_sum = torch.zeros(option("num_blocks") or case.labels.shape[0], dtype=torch.float64)
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


def packed(rows: int, cuts: Sequence[int]) -> dict[str, Any]:
    """Blocks that follow one another in a batch of `rows` rows, as the options of a call: block i is the tokens
    [cuts[i], cuts[i+1])."""
    lengths = torch.tensor(cuts).diff()
    return {
        "block_ids": torch.arange(len(lengths)).repeat_interleave(lengths).view(rows, -1),
        "num_blocks": len(lengths),
    }


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
    return Case(hidden.to(dtype), weight.to(weight_dtype or dtype), labels, token_weight.float(), options)


def path(name: str) -> dict[str, Any]:
    """Return the options that one of PATHS or SCORE_PATHS stands for."""
    mode, backend, fused, *_ = (*name.split("/"), "", "")
    return {"mode": mode, "backend": backend or "torch"} | ({"score_buffer_bytes": 0} if fused else {})


def call(*tensors: Tensor, function: Any = block_cross_entropy, **options: Any) -> tuple[Tensor, BlockStats]:
    """block_cross_entropy, on the GPU where there is one and the backend is made for it; results are on the CPU."""
    device = "cuda" if options.get("backend") == "triton" and torch.cuda.is_available() else "cpu"
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    loss, stats = function(*(tensor.to(device) for tensor in tensors), **options)
    return loss.cpu(), BlockStats(*(value.cpu() for value in stats))


def run(case: Case, upstream: float = 1.0, function: Any = block_cross_entropy, **more: Any) -> Result:
    hidden, weight = (t.detach().clone().requires_grad_() for t in (case.hidden, case.weight))
    options = {**case.options, **more}
    loss, stats = call(hidden, weight, case.labels, case.token_weight, function=function, **options)
    (upstream * loss).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(loss.detach(), *stats, hidden.grad, weight.grad)


def errors(case: Case, result: Result, expected: Result) -> list[float]:
    """Relative errors of loss, statistics and gradients; counts must be equal."""
    pairs = [
        (result.loss, expected.loss),
        (result.nll_sum, expected.nll_sum),
        (result.d_hidden[..., case.channels], expected.d_hidden[..., case.channels]),
        (result.d_weight, expected.d_weight),
    ]
    errors = [((a.double() - b).norm() / (b.norm() + 1e-12)).item() for a, b in pairs]
    return [*errors, float(not torch.equal(result.count.double(), expected.count))]


def score_errors(case: Case, expected: Result, function: Any = block_cross_entropy, **more: Any) -> list[float]:
    """Return the errors of loss and statistics, without a gradient."""
    tensors = (case.hidden, case.weight, case.labels, case.token_weight)
    loss, stats = call(*tensors, function=function, **{**case.options, **more})
    return errors(case, Result(loss, *stats, expected.d_hidden, expected.d_weight), expected)


def small_tiles(triton_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every loop of the kernels runs several times on our cases."""
    monkeypatch.setattr(triton_rows, "ROW", triton_rows.RowConfig(block=8, num_warps=1))
    score = triton_rows.ScoreConfig(16, 16, 16, num_warps=1, num_stages=1, group_tiles=2, slices=3)
    for name in ("SCORE_HOPPER", "SCORE_HALF", "SCORE_FLOAT"):
        monkeypatch.setattr(triton_rows, name, score)


def small_slices(scoring: Any, monkeypatch: pytest.MonkeyPatch, columns: int = 5) -> None:
    """Slices of the vocabulary of which our cases have several, and a buffer for them that may be as small."""
    monkeypatch.setattr(scoring, "SLICE_COLUMNS", columns)
    monkeypatch.setattr(scoring, "FUSED_BELOW_ROWS", 1)


ALL = {"z_loss": 0.3, "label_smoothing": 0.1, "logit_softcap": 2.0}
CASES: dict[str, Callable[[], Case]] = {
    "plain": make_case,
    "z-loss": lambda: make_case(z_loss=0.3),
    "smoothing": lambda: make_case(label_smoothing=0.1),
    "softcap": lambda: make_case(logit_softcap=2.0),
    "all options": lambda: make_case(**ALL),
    "padded vocabulary": lambda: make_case(vocab=24, vocab_size=17),
    "padded vocabulary, all options": lambda: make_case(vocab=24, vocab_size=17, **ALL),
    "padded vocabulary, smoothing": lambda: make_case(vocab=24, vocab_size=17, label_smoothing=0.1),
    "one token in the vocabulary": lambda: make_case(vocab=4, vocab_size=1),
    "nothing masked": lambda: make_case(ignored=0.0, masked=0.0),
    "another ignore index": lambda: make_case(ignore_index=5),
    "ragged blocks": lambda: make_case(**packed(3, [0, 2, 2, 9, 10, 21])),
    "scattered blocks": lambda: make_case(block_ids=torch.arange(21).mul(5).remainder(4).view(3, 7), num_blocks=6),
    "large logits": lambda: make_case(scale=20.0, **ALL | {"logit_softcap": 0.0, "z_loss": 1e-3}),
    "wider than the lanes": lambda: make_case(vocab=257, width=33, rows=2),
    "wider than the lanes, all options": lambda: make_case(vocab=257, width=33, rows=2, **ALL),
}


def shifted(shift: float, **options: Any) -> Case:
    """Logits moved by `shift`, through one more channel of ones; a grid of 1/64 keeps their fp32 sums exact."""
    case = make_case(dtype=torch.float64, **options)
    rows, length, _ = case.hidden.shape
    ones, shifts = torch.ones(rows, length, 1), torch.full((case.weight.shape[0], 1), shift)
    case.hidden = torch.cat(((case.hidden * 8).round() / 8, ones), 2).float()
    case.weight = torch.cat(((case.weight * 8).round() / 8, shifts), 1).float()
    # The gradient of the ones is `shift` times a sum that is 0 but for rounding.
    case.channels = slice(0, -1)
    return case


CASES |= {
    f"logits around {shift:g}, smoothing {smoothing:g}": lambda shift=shift, smoothing=smoothing: shifted(  # type: ignore[misc]
        shift, label_smoothing=smoothing
    )
    for shift in (1000.0, -1000.0, -120.0)
    for smoothing in (0.0, 0.1)
}
