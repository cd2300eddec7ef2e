"""Shows where the cross-entropy's time goes: bytes a second of each Triton kernel, and the profiler's table of a call.

    python tools/profile_kernels.py [--shape 8192x4096x128256] [--json OUT.json]

Bytes are the fewest that a kernel can move: every number read or written once. bf16 on a GPU; without one, Triton's
interpreter on the CPU, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from benchmark_kernels import Inputs, make_inputs, ours, timed
from torch import Tensor

from megatron_lfr.kernels import triton_rows
from megatron_lfr.kernels.softmax import Problem, describe_tokens, differentiate


def kernel_calls(x: Inputs) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return {name: (call, bytes)}."""
    labels, vocab = x.labels.flatten(), len(x.weight)
    problem = Problem(vocab, 0, vocab, None, False, z_loss=0.0, smoothing=0.0, softcap=0.0)
    logits = torch.randn(len(labels), vocab, device=labels.device)
    rows = triton_rows.TritonRows(logits, labels, problem, x.hidden.dtype)
    coefficients = differentiate(describe_tokens(rows.statistics(), problem), x.token_weight.flatten(), problem)
    product = torch.randn_like(x.weight)
    one, half = (torch.full((), value, device=labels.device) for value in (1.0, 0.5))
    written = logits.numel() * x.hidden.element_size()
    return {
        "row_statistics": (rows.statistics, logits.nbytes),
        "row_gradient": (lambda: rows.gradient(coefficients), logits.nbytes + written),
        "scale_in_place by 0.5": (lambda: triton_rows.scale_in_place(product, half), 2 * product.nbytes),
        "scale_in_place by 1": (lambda: triton_rows.scale_in_place(product, one), 0),
    }


def measure(call: Callable[[], Any], device: str, rounds: int) -> float:
    """Return the median milliseconds of a call."""
    call()
    return statistics.median(timed(call, device) for _ in range(rounds))


def table_of(call: Callable[[], Tensor], device: str) -> str:
    """Return the profiler's table of one call with its backward."""
    call().backward()  # type: ignore[no-untyped-call]
    with torch.profiler.profile() as profile:  # of all devices that are there
        call().backward()  # type: ignore[no-untyped-call]
        if device == "cuda":
            torch.cuda.synchronize()
    order = f"self_{device}_time_total"
    table: str = profile.key_averages().table(sort_by=order, row_limit=14, max_name_column_width=60)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="8192x4096x128256", help="shape of the problem: tokens x hidden x vocabulary"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, width, vocab = (int(number) for number in args.shape.split("x"))
    x = make_inputs(tokens, width, vocab, device, torch.bfloat16 if device == "cuda" else torch.float32)
    results = {}
    for name, (call, moved) in kernel_calls(x).items():
        ms = measure(call, device, rounds=10 if device == "cuda" else 1)
        results[name] = {"ms": ms, "bytes": moved, "GB/s": moved / ms / 1e6}
        print(f"{name:24s} {ms:9.3f} ms {moved / ms / 1e6:8.0f} GB/s")
        if args.json:
            args.json.write_text(json.dumps(results) + "\n")
    for mode in ("save", "chunk"):
        print(f"\nours, {mode}\n{table_of(lambda mode=mode: ours(mode, backend='triton')(x), device)}")  # type: ignore[misc]


if __name__ == "__main__":
    main()
