"""Prints one table of what tools/gpu_check.sh measured: its parts, and bars of the cross-entropy against figures.

python tools/gpu_table.py RESULTS.json...
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]
Bar = tuple[str, float, float, Callable[[Rows, Rows], float]]
"""What is compared, its bar at a vocabulary of 32000 and of 128256, and the figure from the rows of forward + backward
and of the forward alone. KeyError where a row was not measured."""

ACCURACY_BARS = (("token NLL", 1e-5), ("block mean", 2e-6), ("dX", 3.2e-3), ("dW", 3.2e-3))


def milliseconds(rows: Rows, name: str) -> float:
    return statistics.median(rows[name]["ms"])


def ratio(one: str, other: str) -> Callable[[Rows, Rows], float]:
    """Return the median of the rounds' ratios, in training."""
    return lambda both, _: statistics.median(a / b for a, b in zip(both[one]["ms"], both[other]["ms"], strict=False))


def score(_: Rows, forward: Rows) -> float:
    return milliseconds(forward, "ours, score") / milliseconds(forward, "floor")


def best_liger(both: Rows, _: Rows) -> float:
    best = min(milliseconds(both, name) for name in both if name.startswith("Liger, ") and both[name].get("ms"))
    return milliseconds(both, "ours, save") / best


def memory(both: Rows, _: Rows) -> float:
    return float(both["ours, chunk"]["beyond_bytes"]) / float(both["eager, fp32 logits"]["beyond_bytes"])


BARS: list[Bar] = [
    ("save / 3 GEMMs", 1.10, 1.10, ratio("ours, save", "floor")),
    ("chunk / 3 GEMMs", 1.15, 1.15, ratio("ours, chunk", "floor")),
    ("score / 1 GEMM", 1.35, 1.35, score),
    ("save / eager, fp32 logits", 0.90, 0.87, ratio("ours, save", "eager, fp32 logits")),
    ("save / torch.compile, bf16 logits", 1.03, 1.03, ratio("ours, save", "torch.compile, bf16 logits")),
    ("save / torch.compile, fp32 logits", 0.97, 0.97, ratio("ours, save", "torch.compile, fp32 logits")),
    ("save / Liger", 0.5, 0.3, ratio("ours, save", "Liger")),
    ("save / Liger, best chunks", 0.95, 0.95, best_liger),
    ("save / Cut Cross-Entropy", 0.7, 0.7, ratio("ours, save", "Cut Cross-Entropy")),
    ("memory beyond: chunk / eager", 1 / 7, 1 / 8, memory),
    ("statistics on / off", 1.005, 1.005, ratio("ours, save", "ours, no statistics")),
]  # fmt: skip


def render(results: dict[str, Any]) -> str:
    """Return the table as text."""
    lines = ["", f"{results['mode']} on {results['card']}"]
    lines += [
        f"  {name:22s} {part['state']:12s} {part['seconds']:6.1f} s  {part['why']}"[:150]
        for name, part in results["parts"].items()
    ]
    figures = {name: part["figures"] for name, part in results["parts"].items() if part.get("figures")}
    kernels = merged([part["results"] for name, part in figures.items() if name.startswith("kernels")])
    if kernels:
        lines += [
            "",
            f"  {'bar (set for an H200)':34s} {'V = 32000':>22s} {'V = 128256':>22s}",
            *bar_lines(kernels),
        ]
        if "H200" not in results["card"]:
            lines.append("  Not an H200: on an H100, save 1.16 to 1.19 and chunk 1.21 to 1.28 are expected.")
        lines += [f"  not run: {reason}" for reason in not_run(kernels)]
    if "accuracy" in figures:
        lines += ["", f"  {'error against fp64':34s}" + "".join(f" {f'{n} {bar:g}':>17s}" for n, bar in ACCURACY_BARS)]
        lines += accuracy_lines(figures["accuracy"]["accuracy"])
    lines.append("")
    for name, part in figures.items():
        if name in ("training", "compiled training"):
            lines.append(
                f"  {name}: {part['tokens_per_second']:.0f} tokens/s, MFU {part['mfu']['causal']:.3f} (causal), "
                f"{part['mfu']['full attention']:.3f} (whole square), {part['peak_memory_gib'] or 0:.1f} GiB"
            )
        elif name == "benchmark":
            lines.append(benchmark_line(part))
        elif name != "accuracy" and not name.startswith("kernels"):
            lines += [f"  {name}: {text}" for text in flat_lines(part)]
    return "\n".join(lines) + "\n"


def benchmark_line(result: dict[str, Any]) -> str:
    """Return the speed and the parts of a result of `megatron-lfr benchmark`."""
    mfu = result["flops"]["causal"]["mfu"]
    parts = ", ".join(f"{name} {1000 * part['mean']:.1f}" for name, part in result["parts"].items())
    return (
        f"  benchmark: {result['tokens_per_second']:.0f} tokens/s, "
        f"MFU {'-' if mfu is None else f'{mfu:.3f}'} (causal), "
        f"{result['memory']['peak_bytes'] / 2**30:.1f} GiB, {100 * result['lfr']['share_of_step']:.2f} % for choosing "
        f"blocks; ms of a step: {parts}"
    )


def flat_lines(part: dict[str, Any]) -> list[str]:
    """Return the figures in a line; those that have figures of their own, a line each."""
    plain = {key: value for key, value in part.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in part.items() if isinstance(value, dict)}
    lines = [", ".join(f"{key} {short(value)}" for key, value in plain.items())] if plain else []
    return lines + [f"{key}: {line}" for key, value in nested.items() for line in flat_lines(value)]


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def merged(results: list[dict[str, Rows]]) -> dict[str, Rows]:
    """Return the rows of several runs of tools/benchmark_kernels.py, by their titles."""
    return {title: rows for part in results for title, rows in part.items()}


def bar_lines(kernels: dict[str, Rows]) -> list[str]:
    lines = []
    for name, *bars, figure in BARS:
        cells = [cell(kernels, vocab, bar, figure) for vocab, bar in zip((32000, 128256), bars, strict=True)]
        lines.append(f"  {name:34s}" + "".join(f" {text:>22s}" for text in cells))
    return lines


def not_run(kernels: dict[str, Rows]) -> list[str]:
    """Return who was not run, and why, once each."""
    reasons = {
        f"{name}: {row['not_run']}": None for rows in kernels.values() for name, row in rows.items() if "not_run" in row
    }
    return list(reasons)


def cell(results: dict[str, Rows], vocab: int, bar: float, figure: Callable[[Rows, Rows], float]) -> str:
    """Return the figure, its bar and whether it is met."""
    both, forward = (
        next((rows for title, rows in results.items() if f"x{vocab} / 1," in title and title.endswith(end)), {})
        for end in ("forward + backward", "forward")
    )
    try:
        value = figure(both, forward)
    except (KeyError, ValueError, ZeroDivisionError, statistics.StatisticsError):
        return "not measured"
    return f"{value:.3f} of {bar:.3f} {'met' if value <= bar else 'MISSED'}"


def accuracy_lines(errors: dict[str, list[float]]) -> list[str]:
    lines = []
    for name, row in errors.items():
        padded = [None] * (4 - len(row)) + row if name.startswith("eager") else row
        cells = ["" if value is None else f"{value:.1e}" for value in padded]
        is_ours_in_bf16 = name.startswith("ours") and "bfloat16" in name
        missed = is_ours_in_bf16 and any(e > bar for e, (_, bar) in zip(row, ACCURACY_BARS, strict=False))
        lines.append(f"  {name:34s}" + "".join(f" {text:>17s}" for text in cells) + ("  MISSED" if missed else ""))
    return lines


def main() -> None:
    for path in sys.argv[1:]:
        print(render(json.loads(Path(path).read_text())))


if __name__ == "__main__":
    main()
