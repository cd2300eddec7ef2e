"""What only a GPU can show: sizes, accuracy of its arithmetic, no waiting for it, graphs, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lfr.kernels import block_cross_entropy
from megatron_lfr.kernels.block_cross_entropy import SCORE_BUFFER_BYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NORMALISER = 1 / 1900


def inputs(tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Any:
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda"}
    hidden = torch.randn(8, tokens // 8, width, **options).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, **options) * scale / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (8, tokens // 8), **options)
    return hidden, weight, labels, torch.full(labels.shape, NORMALISER, device="cuda")


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token NLLs [B, S], dX and dW in fp64."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = (x @ w.t()).flatten(0, 1)
    nll = F.cross_entropy(logits, labels.flatten(), reduction="none")
    (nll.sum() * NORMALISER).backward()
    assert x.grad is not None
    assert w.grad is not None
    return nll.detach().view(labels.shape), x.grad, w.grad


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("mode", ["save", "chunk"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_accuracy(mode: str, scale: float) -> None:
    """KERNEL bars: token NLL, block means, gradients, these also against eager PyTorch with fp32 logits."""
    hidden, weight, labels, token_weight = inputs(2048, 1024, 16000, scale=scale)
    nll, d_hidden, d_weight = exact(hidden, weight, labels)
    each = torch.arange(2048, device="cuda").view(8, 256)
    options: Any = {"mode": mode, "chunk_rows": 600}
    loss, tokens = block_cross_entropy(hidden, weight, labels, token_weight, block_ids=each, num_blocks=2048, **options)
    largest = float((hidden.detach().float() @ weight.detach().float().t()).abs().max())
    bound = 1e-5 if largest <= 16 else 2**-19 * largest
    assert float((tokens.nll_sum.double() - nll.flatten()).abs().max()) <= bound
    _, stats = block_cross_entropy(hidden, weight, labels, token_weight, **options)
    assert float(((stats.nll_sum / stats.count).double() / nll.mean(1) - 1).abs().max()) <= 2e-6
    loss.backward()
    errors = relative(hidden.grad, d_hidden), relative(weight.grad, d_weight)
    hidden.grad = weight.grad = None
    logits = F.linear(hidden, weight).float().flatten(0, 1)
    (F.cross_entropy(logits, labels.flatten(), reduction="sum") * NORMALISER).backward()
    eager = relative(hidden.grad, d_hidden), relative(weight.grad, d_weight)
    assert max(errors) <= 3.2e-3
    assert all(ours <= 1.05 * theirs for ours, theirs in zip(errors, eager, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_agree_with_training(dtype: torch.dtype) -> None:
    case = inputs(1000, 512, 9003, dtype)
    training = block_cross_entropy(*case, mode="save")
    for buffer in (SCORE_BUFFER_BYTES, 512 * 8192 * 4, 0):
        scored = block_cross_entropy(*case, mode="score", score_buffer_bytes=buffer)
        torch.testing.assert_close(scored[0], training[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(scored[1].nll_sum, training[1].nll_sum, rtol=2e-6, atol=0)


@pytest.mark.parametrize("mode", ["save", "chunk", "score"])
def test_reruns_have_the_same_bits(mode: Any) -> None:
    case = inputs(4096, 512, 32000)

    def run() -> list[Tensor]:
        loss, stats = block_cross_entropy(*case, mode=mode, chunk_rows=1024)
        return [loss, *stats] + (list(torch.autograd.grad(loss, case[:2])) if mode != "score" else [])

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["save", "chunk", "score"])
def test_the_host_never_waits(mode: Any, request: pytest.FixtureRequest) -> None:
    case = inputs(1024, 256, 3000)
    ids = torch.arange(1024, device="cuda").ge(100).long().view_as(case[2])
    options: Any = {
        "mode": mode,
        "chunk_rows": 300,
        "block_ids": ids,
        "num_blocks": 2,
        "z_loss": 1e-4,
        "logit_softcap": 30.0,
    }
    block_cross_entropy(*case, **options)  # compiles
    request.getfixturevalue("waiting_is_an_error")
    loss, _ = block_cross_entropy(*case, **options)
    if mode != "score":
        loss.backward()


@pytest.mark.parametrize("mode", ["save", "chunk", "score"])
def test_a_cuda_graph_replays_it(mode: Any) -> None:
    case = inputs(1024, 256, 3000)

    def run() -> list[Tensor]:
        loss, stats = block_cross_entropy(*case, mode=mode, chunk_rows=300)
        return [loss, *stats] + (list(torch.autograd.grad(loss, case[:2])) if mode != "score" else [])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        case[0].copy_(torch.randn_like(case[0]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_more_than_2_to_the_31_logits() -> None:
    hidden, weight, labels, token_weight = inputs(2**16 + 512, 16, 2**15)
    _, stats = block_cross_entropy(hidden, weight, labels, token_weight, mode="save")
    _, parts = block_cross_entropy(hidden, weight, labels, token_weight, mode="chunk")
    torch.testing.assert_close(stats.nll_sum, parts.nll_sum, rtol=1e-6, atol=0)


def test_memory() -> None:
    """A chunk's logits at most, beyond the gradients; a score's buffer, and without one far less."""
    hidden, weight, labels, token_weight = inputs(16384, 256, 32000)
    chunk = 4 * 2048 * 32000

    def peak(**options: Any) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = block_cross_entropy(hidden, weight, labels, token_weight, **options)
        if options["mode"] != "score":
            loss.backward()
        hidden.grad = weight.grad = None
        return torch.cuda.max_memory_allocated() - before

    gradients = 6 * weight.numel() + 4 * hidden.numel()
    assert peak(mode="chunk", chunk_rows=2048) <= 1.05 * chunk + gradients
    assert peak(mode="score") <= 1.05 * SCORE_BUFFER_BYTES
    assert peak(mode="score", score_buffer_bytes=0) <= chunk / 8
