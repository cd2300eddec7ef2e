"""The Triton kernels where PyTorch's path cannot go wrong: tiles, memory that is written over, large offsets."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_lfr.kernels import scoring, triton_rows
from megatron_lfr.kernels.matmul import matmul
from megatron_lfr.kernels.softmax import Problem, describe_tokens, differentiate
from megatron_lfr.kernels.torch_rows import TorchRows
from support.cross_entropy_oracle import (
    ALL,
    BOUND,
    CASES,
    errors,
    make_case,
    oracle,
    path,
    run,
    score_errors,
    small_slices,
    small_tiles,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", CASES)
def test_small_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(triton_rows, monkeypatch)
    case = CASES[name]()
    columns = max(5, len(case.weight) // 3)
    small_slices(scoring, monkeypatch, columns)
    expected = oracle(case)
    assert max(errors(case, run(case, chunk_rows=5, **path("chunk/triton")), expected)) <= BOUND
    assert max(score_errors(case, expected, **path("score/triton/fused"))) <= BOUND
    rows_of_7 = {"score_buffer_bytes": 7 * columns * 4}
    assert max(score_errors(case, expected, **path("score/triton") | rows_of_7)) <= BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_inputs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16-bit numbers are summed in fp32: the interpreter's own product of bf16 numbers is wrong."""
    small_tiles(triton_rows, monkeypatch)
    case = make_case(rows=4, vocab=300, width=80, dtype=dtype, scale=0.3, **ALL)
    assert max(score_errors(case, oracle(case), **path("score/triton/fused"))) <= BOUND


@pytest.mark.parametrize("vocab", [63, 64, 65, 127, 129, 255, 257, 4095, 4096, 4097, 9001])
def test_vocabularies_around_tile_sizes(vocab: int) -> None:
    case = make_case(rows=1, length=2, width=16, vocab=vocab, ignored=0.0, masked=0.0, **ALL)
    expected = oracle(case)
    assert max(errors(case, run(case, **path("save/triton")), expected)) <= BOUND
    assert max(score_errors(case, expected, **path("score/triton/fused"))) <= BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_is_scaled_where_it_is(dtype: torch.dtype) -> None:
    """In fp32; by 1, not at all: bits that are no number stay as they are."""
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    before = values.clone()
    half = torch.tensor(0.5, device=DEVICE)
    assert triton_rows.scale_in_place(values, half).data_ptr() == values.data_ptr()
    assert torch.equal(values, before * half)
    values[0, 0] = torch.nan
    bits = values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).clone()
    triton_rows.scale_in_place(values, torch.ones((), device=DEVICE))
    assert torch.equal(values.view(bits.dtype), bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_takes_the_logits_memory(dtype: torch.dtype) -> None:
    logits, labels, problem, weight = rows_of_logits(5, 5000)
    reference = TorchRows(logits.clone(), labels, problem, wants_gradient=True)
    rows = triton_rows.TritonRows(logits, labels, problem, dtype)
    statistics = rows.statistics()
    torch.testing.assert_close(statistics, reference.statistics())
    coefficients = differentiate(describe_tokens(statistics, problem), weight, problem)
    gradient = rows.gradient(coefficients)
    assert gradient.data_ptr() == logits.data_ptr()
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, reference.gradient(coefficients).to(dtype))


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^30 elements apart, in memory that is never touched: the last one begins at element 2^31."""
    logits, labels, problem, weight = rows_of_logits(3, 40)
    far = torch.empty(2**31 + 40, device=DEVICE).as_strided((3, 40), (2**30, 1))
    far.copy_(logits)
    near = triton_rows.TritonRows(logits, labels, problem, torch.float32)
    rows = triton_rows.TritonRows(far, labels, problem, torch.float32)
    statistics = near.statistics()
    assert torch.equal(rows.statistics(), statistics)
    coefficients = differentiate(describe_tokens(statistics, problem), weight, problem)
    assert torch.equal(rows.gradient(coefficients), near.gradient(coefficients))


def test_score_offsets_beyond_32_bits() -> None:
    hidden, weight = torch.randn(3, 16, device=DEVICE), torch.randn(40, 16, device=DEVICE)
    labels = torch.tensor([3, 39, 7], device=DEVICE)
    far = torch.empty(2**31 + 16, device=DEVICE).as_strided((3, 16), (2**30, 1))
    far.copy_(hidden)
    _, _, problem, _ = rows_of_logits(3, 40)
    assert torch.equal(*(triton_rows.score_fused(x, weight, labels, problem) for x in (hidden, far)))


def rows_of_logits(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, Problem, torch.Tensor]:
    """Logits, labels, their problem and weights."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (rows, columns))
    labels = torch.randint(0, columns, (rows,), generator=generator)
    problem = Problem(columns, 0, columns, None, False, z_loss=0.1, smoothing=0.1, softcap=3.0)
    w = torch.rand(rows, generator=generator)
    return matmul(hidden, weight.t()).to(DEVICE), labels.to(DEVICE), problem, w.to(DEVICE)


def test_without_a_gpu_and_an_interpreter_triton_is_refused() -> None:
    code = (
        "import torch; from megatron_lfr.kernels import block_cross_entropy as f; x = torch.ones(1, 2, 4)\n"
        "f(x, x[0], torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), backend='triton')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "ValueError: backend 'triton': needs a GPU or TRITON_INTERPRET=1, hidden is on cpu" in done.stderr
