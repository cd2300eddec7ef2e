"""Compares the fused cross-entropy with its peers: time and peak memory, forward + backward and forward alone.

    python tools/benchmark_kernels.py [--shapes 8192x4096x32000,8192x4096x128256] [--tp 1,8] [--json OUT.json]
    python tools/benchmark_kernels.py --accuracy

Shapes are tokens x hidden x vocabulary; --tp divides the vocabulary, as a tensor-parallel rank sees it (no
communication). In each round every implementation runs once, in turn; medians are printed with the 10th and 90th
percentile, and the median of each round's ratio to the first of ours. "peak" is what a call needs beyond its inputs;
"beyond" leaves out the gradients that it returns too, and the fp32 sum of dW that "chunk" cannot do without. Whoever
is not installed, or fails (out of memory, say), is listed with the reason. --json is written after every row.

On a GPU: bf16 by default; "floor" is three bf16 matrix products, the least that forward and backward can do; one for
the forward alone. On a CPU ours is its PyTorch path, in fp32; "chunked" is the scheme of Liger's kernel in PyTorch.

"no statistics" is ours without the sums over blocks. "Liger" chooses its chunks itself; "Liger, 8 x" gives it as many
times the memory for them.

--accuracy gives errors against fp64 instead: of the loss of each token, of the mean of each block, and of the
gradients (relative L2), ours and eager's.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from process_memory import peak_beyond
from torch import Tensor
from torch.nn import functional as F

from megatron_lfr.kernels import block_cross_entropy
from megatron_lfr.kernels.autograd import Call, LinearCrossEntropy
from megatron_lfr.kernels.input_checks import choose_backend
from megatron_lfr.kernels.softmax import Problem

Run = Callable[[], None]
Results = dict[str, dict[str, Any]]
DEFAULT_SHAPES = {"cuda": "8192x4096x32000,8192x4096x128256", "cpu": "1024x256x8192"}


@dataclass
class Inputs:
    """A batch of 8 rows; hidden and weight collect gradients."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    token_weight: Tensor

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes


def make_inputs(tokens: int, width: int, vocab: int, device: str, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "generator": generator}
    hidden = torch.randn(8, tokens // 8, width, **options).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, **options) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (8, tokens // 8), **options)
    # 1 / tokens, a little less: a normaliser that is no power of two.
    return Inputs(hidden, weight, labels, torch.full(labels.shape, 0.97 / tokens, device=device))


def eager_loss(x: Inputs, logit_dtype: torch.dtype) -> Tensor:
    logits = F.linear(x.hidden, x.weight).flatten(0, 1).to(logit_dtype)
    return F.cross_entropy(logits, x.labels.flatten())


class ChunkedLoss(torch.autograd.Function):
    """Liger's scheme: chunks of about (hidden / vocabulary) of the tokens, gradients in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = max(1, len(hidden) * hidden.shape[1] // weight.shape[0])
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros(())
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ weight.t()).requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(logits, labels[part], reduction="sum") / len(hidden)
            (d_logits,) = torch.autograd.grad(loss, logits)
            total += loss.detach()
            d_hidden[part] = d_logits @ weight
            d_weight.addmm_(d_logits.t(), hidden[part])
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None


def ours(mode: Any, **options: Any) -> Callable[[Inputs], Tensor]:
    return lambda x: block_cross_entropy(x.hidden, x.weight, x.labels, x.token_weight, mode=mode, **options)[0]


def without_statistics(x: Inputs) -> Tensor:
    """Compute what `ours, save` does, without the sums over blocks."""
    vocab = len(x.weight)
    problem = Problem(vocab, 0, vocab, None, False, z_loss=0.0, smoothing=0.0, softcap=0.0)
    call = Call(problem, choose_backend(x.hidden, "auto"), x.labels.numel(), keeps_logits=True)
    flat = (x.hidden.flatten(0, 1), x.weight, x.labels.flatten(), x.token_weight.flatten())
    loss: Tensor = LinearCrossEntropy.apply(*flat, call)[0]  # type: ignore[no-untyped-call]
    return loss


def peers(device: str) -> dict[str, Callable[[Inputs], Tensor]]:
    """Return losses by name; a peer that is missing raises when it is called.

    Each compiles anew what it compiles: at a second shape it would otherwise get code for any shape, which is slower.
    """
    torch.compiler.reset()
    if device == "cpu":
        return {
            "eager": lambda x: eager_loss(x, torch.float32),
            "chunked": lambda x: ChunkedLoss.apply(x.hidden.flatten(0, 1), x.weight, x.labels.flatten()),  # type: ignore[no-untyped-call]
        }
    compiled = {
        dtype: torch.compile(lambda x, dtype=dtype: eager_loss(x, dtype), dynamic=False)
        for dtype in (torch.bfloat16, torch.float32)
    }
    return {
        "eager, fp32 logits": lambda x: eager_loss(x, torch.float32),
        "torch.compile, bf16 logits": compiled[torch.bfloat16],
        "torch.compile, fp32 logits": compiled[torch.float32],
        "torch linear_cross_entropy": torch_linear_loss,
        "Liger": liger_loss,
        **{f"Liger, {times} x": lambda x, times=times: liger_chunked_loss(x, times) for times in (4, 8, 16, 64)},  # type: ignore[misc]
        "Cut Cross-Entropy": cut_loss,
    }


def torch_linear_loss(x: Inputs) -> Tensor:
    function: Any = F.linear_cross_entropy  # type: ignore[attr-defined]  # in newer versions
    loss: Tensor = function(x.hidden.flatten(0, 1), x.weight, x.labels.flatten())
    return loss


def liger_loss(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(x.weight, x.hidden.flatten(0, 1), x.labels.flatten())
    return loss


def liger_chunked_loss(x: Inputs, times: int) -> Tensor:
    """Compute the loss with logits of `times` the size of hidden; an argument that no module of Liger's passes on."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    names = inspect.signature(Function.forward).parameters
    if "chunk_mem_const" not in names:
        raise ImportError("this version of Liger has no chunk_mem_const")
    defaults = [p.default for p in names.values()][4:]  # behind ctx and three tensors
    defaults[list(names).index("chunk_mem_const") - 4] = times
    loss: Tensor = Function.apply(x.hidden.flatten(0, 1), x.weight, x.labels.flatten(), *defaults)[0]
    return loss


def cut_loss(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(x.hidden, x.weight, x.labels)
    return loss


def floor(x: Inputs, backward: bool) -> None:
    """Compute the matrix products alone, on operands of the inputs' dtype."""
    with torch.no_grad():
        hidden = x.hidden.flatten(0, 1)
        logits = hidden @ x.weight.t()
        if backward:
            torch.mm(logits, x.weight)
            torch.mm(logits.t(), hidden)


def implementations(x: Inputs, device: str, backward: bool) -> dict[str, Run]:
    names: dict[str, Callable[[Inputs], Tensor]] = (
        {"ours, save": ours("save"), "ours, chunk": ours("chunk"), "ours, no statistics": without_statistics}
        if backward
        else {"ours, score": ours("score"), "ours, score, fused": ours("score", score_buffer_bytes=0)}
    )

    def run(loss: Callable[[Inputs], Tensor]) -> None:
        if backward:
            loss(x).backward()  # type: ignore[no-untyped-call]
            x.clear()
        else:
            with torch.no_grad():
                loss(x)

    runs: dict[str, Run] = {name: lambda f=f: run(f) for name, f in names.items()}  # type: ignore[misc]
    others: dict[str, Run] = {name: lambda f=f: run(f) for name, f in peers(device).items()}  # type: ignore[misc]
    return runs | {"floor": lambda: floor(x, backward)} | others


def timed(run: Run, device: str) -> float:
    """Return the milliseconds of a call."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def peak_bytes(run: Run, device: str) -> int:
    """Return the bytes that a call takes at most, beyond those in use before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    return peak_beyond(run)


def measure(
    runs: dict[str, Run], kept_bytes: Callable[[str], int], device: str, rounds: int, flush: Callable[[Results], None]
) -> Results:
    """`kept_bytes`: of the memory that a call of that name takes, what does not count as its own. `flush` is given what
    is known so far, after every row and round."""
    results: Results = {}
    for name, run in runs.items():
        try:
            for _ in range(3):
                run()
            peak = peak_bytes(run, device)
            results[name] = {"peak_bytes": peak, "beyond_bytes": max(0, peak - kept_bytes(name)), "ms": []}
        except Exception as error:  # whatever a peer, a compiler or the memory says
            results[name] = not_run(error)
        flush(results)
    for _ in range(rounds):
        for name, result in results.items():
            if "ms" in result:
                try:
                    result["ms"].append(timed(runs[name], device))
                except Exception as error:
                    results[name] = not_run(error)
        flush(results)
    return results


def not_run(error: Exception) -> dict[str, str]:
    lines = f"{type(error).__name__}: {error}".splitlines()
    return {"not_run": lines[0][:100]}


def report(title: str, results: dict[str, dict[str, Any]]) -> None:
    print(
        f"\n{title}\n{'':28s} {'median ms':>10s} {'10 % .. 90 %':>19s} {'/ ours':>7s} {'peak MiB':>9s} {'beyond':>9s}"
    )
    base = next((result["ms"] for name, result in results.items() if name.startswith("ours") and "ms" in result), [])
    for name, result in results.items():
        if "not_run" in result:
            print(f"{name:28s} not run: {result['not_run']}")
            continue
        times = sorted(times_of(result))
        median, low, high = statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10]
        spread = f"{low:.2f} .. {high:.2f}"
        ratio = statistics.median(a / b for a, b in zip(times_of(result), base, strict=False)) if base else float("nan")
        peak, beyond = result["peak_bytes"] / 2**20, result["beyond_bytes"] / 2**20
        print(f"{name:28s} {median:10.2f} {spread:>19s} {ratio:7.3f} {peak:9.1f} {beyond:9.1f}")


def times_of(result: dict[str, Any]) -> list[float]:
    """Return the milliseconds of each round; NaN where none was run."""
    return result["ms"] or [float("nan")]


def accuracy(shape: tuple[int, int, int], device: str, dtypes: list[torch.dtype]) -> dict[str, list[float]]:
    """Print errors against fp64 on the same inputs."""
    results: dict[str, list[float]] = {}
    print(f"\n{'x'.join(map(str, shape))}\n{'':28s} {'token NLL':>10s} {'block mean':>10s} {'dX':>10s} {'dW':>10s}")
    for dtype in dtypes:
        x = make_inputs(*shape, device, dtype)
        nll, *gradients = exact(x)
        each = torch.arange(x.labels.numel(), device=device).view_as(x.labels)
        for mode in ("save", "chunk", "score"):
            options: dict[str, Any] = {"mode": mode, "chunk_rows": shape[0] // 3}
            inputs = (x.hidden, x.weight, x.labels, x.token_weight)
            loss, tokens = block_cross_entropy(*inputs, block_ids=each, num_blocks=each.numel(), **options)
            _, blocks = block_cross_entropy(*inputs, **options)
            errors = [
                (tokens.nll_sum.double() - nll.flatten()).abs().max(),
                ((blocks.nll_sum / blocks.count).double() / nll.mean(1) - 1).abs().max(),
            ]
            if mode != "score":
                computed = torch.autograd.grad(loss, (x.hidden, x.weight))
                errors += [(a.double() - b).norm() / b.norm() for a, b in zip(computed, gradients, strict=True)]
            results[f"ours, {mode}, {dtype}"] = [float(error) for error in errors]
            print(f"{f'ours, {mode}, {dtype}':28s}" + "".join(f" {float(error):10.1e}" for error in errors))
        eager = eager_loss(x, torch.float32) * (0.97 * x.labels.numel() / shape[0])
        computed = torch.autograd.grad(eager, (x.hidden, x.weight))
        errors = [(a.double() - b).norm() / b.norm() for a, b in zip(computed, gradients, strict=True)]
        results[f"eager, {dtype}"] = [float(error) for error in errors]
        print(f"{f'eager, {dtype}':50s}" + "".join(f" {float(error):10.1e}" for error in errors))
    return results


def exact(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the NLL of each token [B, S], dX and dW of the weighted sum, in fp64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    nll = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), x.labels.flatten(), reduction="none")
    d_hidden, d_weight = torch.autograd.grad((nll * x.token_weight.flatten()).sum(), (hidden, weight))
    return nll.detach().view_as(x.labels), d_hidden, d_weight


def environment(device: str) -> dict[str, str]:
    return {
        "date": str(date.today()),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def commit() -> str:
    """Return the commit; empty without git, as on a machine that was given a copy of the tree."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shapes", default=DEFAULT_SHAPES[device])
    parser.add_argument(
        "--tp", default="1", help="tensor-parallel sizes that divide the vocabulary, separated by commas"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    record: dict[str, Any] = {"environment": environment(device), "results": {}}
    print(record["environment"])

    def write() -> None:
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    if args.accuracy:
        dtypes = [torch.bfloat16, torch.float16, torch.float32] if device == "cuda" else [torch.bfloat16, torch.float32]
        shape = (2048, 1024, 16000) if device == "cuda" else (1024, 256, 8192)
        record["accuracy"] = accuracy(shape, device, dtypes)
        write()
        return
    for shape in args.shapes.split(","):
        tokens, width, vocab = (int(number) for number in shape.split("x"))
        for ranks in (int(number) for number in args.tp.split(",")):
            x = make_inputs(tokens, width, vocab // ranks, device, dtype)
            for backward in (True, False):
                title = f"{shape} / {ranks}, {dtype}, forward" + (" + backward" if backward else "")

                def flush(results: Results, title: str = title) -> None:
                    record["results"][title] = results
                    write()

                def kept_bytes(name: str, x: Inputs = x, backward: bool = backward) -> int:
                    sums = 4 * x.weight.numel() if name == "ours, chunk" else 0
                    return x.gradient_bytes() + sums if backward else 0

                runs = implementations(x, device, backward)
                report(title, measure(runs, kept_bytes, device, args.rounds, flush))


if __name__ == "__main__":
    main()
