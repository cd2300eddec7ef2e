"""Measures what a layer computes between its matrix products and its attention: ours, compiled, and Liger's.

    python tools/benchmark_layers.py [--model-preset 1.1B] [--tokens 8192] [--rounds 20] [--json OUT.json]

Of norms, rotary positions and SwiGLU, the medians of a forward and backward in bf16 on a GPU, in rounds that take all
of them in turn; and of the fewest bytes that they can move (inputs, results and all gradients once; inputs that the
backward needs once more), how many a second that makes. "before" is without PyTorch's fused bf16 RMSNorm, rotations in
mixed dtypes, and a backward that computes silu(gate) again. Without a GPU the times say nothing about one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_kernels import timed
from torch import Tensor
from torch.nn import functional as F

from megatron_lfr.model import MODEL_PRESETS, ModelConfig
from megatron_lfr.model.fused import LayerKernels, check_package, layer_kernels
from megatron_lfr.model.rope import rope_tables

SEQUENCE = 2048


@dataclass(frozen=True)
class Case:
    """One part of a layer, as a method of LayerKernels."""

    method: str
    inputs: tuple[Tensor, ...]
    """Those that are trained come with gradients."""
    options: tuple[Any, ...]
    keeps_inputs: bool
    """Whether the backward needs them."""

    def least_bytes(self) -> int:
        """Return the bytes that one kernel for the forward and one for the backward read or write."""
        trained = sum(x.nbytes for x in self.inputs if x.requires_grad)
        result = self.inputs[0].nbytes  # of all parts, the results are as large as the first input
        return 2 * (trained + result) + trained * self.keeps_inputs


def make_cases(config: ModelConfig, tokens: int, device: str) -> dict[str, Case]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    length = min(tokens, SEQUENCE, config.max_position_embeddings)
    heads = config.num_attention_heads // config.query_groups
    tables = (table[None, :length, None, None].to(device) for table in rope_tables(config))
    qkv = random(tokens // length, length, config.query_groups, heads + 2, config.head_dim)
    hidden, gated = (tokens, config.hidden_size), (tokens, config.ffn_size)
    return {
        "RMSNorm": Case("rms_norm", (random(*hidden), random(config.hidden_size)), (config.norm_epsilon,), True),
        "LayerNorm": Case(
            "layer_norm",
            (random(*hidden), random(config.hidden_size), random(config.hidden_size)),
            (config.norm_epsilon,),
            True,
        ),
        "rotary positions": Case("split_and_rotate", (qkv, *tables), (heads,), False),
        "SwiGLU": Case("swiglu", (random(*gated), random(*gated)), (), True),
    }


def before() -> LayerKernels:
    """Make layers as they were before: casts to fp32 and back, halves swapped by a copy, silu(gate) kept."""

    def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), epsilon).to(x.dtype)

    def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        x = qkv[..., : heads + 1, :].float()
        rotated = torch.addcmul(x * cos, torch.cat(x.chunk(2, -1)[::-1], -1), sin).to(qkv.dtype)
        return rotated[..., :heads, :], rotated[..., heads, :], qkv[..., heads + 1, :]

    return LayerKernels(norm, rotate, lambda gate, up: F.silu(gate) * up)


def variants() -> tuple[dict[str, LayerKernels], dict[str, str]]:
    """Return what there is to measure, and why the rest is not."""
    plain = LayerKernels()
    compiled = {name: torch.compile(getattr(plain, name), dynamic=False) for name in vars(plain)}
    kernels, missing = {"ours": plain, "before": before(), "compiled": LayerKernels(**compiled)}, {}
    try:
        check_package("--layer-kernels", "liger")
        kernels["Liger"] = layer_kernels("liger")
    except ValueError as error:
        missing["Liger"] = str(error)
    return kernels, missing


def forward_backward(case: Case, kernels: LayerKernels) -> Callable[[], Any]:
    function, trained = getattr(kernels, case.method), [x for x in case.inputs if x.requires_grad]

    def run() -> Any:
        results = function(*case.inputs, *case.options)
        results = results if isinstance(results, tuple) else (results,)
        # The results stand for their gradients: of their size, and made at no cost.
        return torch.autograd.grad(results, trained, [x.detach() for x in results])

    return run


def measure(case: Case, kernels: dict[str, LayerKernels], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Return, for each variant, its times and what they make of the fewest bytes, or why it was not run."""
    runs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, kernel in kernels.items():
        run = forward_backward(case, kernel)
        try:
            for _ in range(3):
                run()
            runs[name] = run
        except Exception as error:  # whatever a peer or a compiler says
            rows[name] = {"not_run": f"{type(error).__name__}: {error}"[:200]}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run, device))
    for name, ms in times.items():
        median = statistics.median(ms)
        rows[name] = {"median ms": median, "GB/s": case.least_bytes() / median / 1e6}
        rows[name] |= {"time / ours": statistics.median(a / b for a, b in zip(ms, times["ours"], strict=True))}
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-preset", default="1.1B", choices=MODEL_PRESETS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels, missing = variants()
    rows: dict[str, Any] = {}
    for title, case in make_cases(MODEL_PRESETS[args.model_preset], args.tokens, device).items():
        rows[title] = measure(case, kernels, args.rounds, device)
        for name, row in rows[title].items():
            print(f"{title:18s} {name:10s} " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if args.json:
            args.json.write_text(json.dumps({**rows, "not run": missing}) + "\n")


if __name__ == "__main__":
    main()
