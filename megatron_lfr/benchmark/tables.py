"""Prints a benchmark's result."""

from __future__ import annotations

from typing import Any

from megatron_lfr.benchmark.parts import STEP
from megatron_lfr.output import print_table


def print_result(result: dict[str, Any]) -> None:
    """Print what a benchmark has measured."""
    step = result["step_seconds"]
    print(
        f"{result['parameters']:,} parameters on {result['ranks']} x {result['device']}, {result['data']}, "
        f"{result['tokens_per_step']:,} tokens a step; {len(step['all'])} steps after {result['warmup_steps']}"
    )
    print_table(["", "value"], _speed(result), "Speed")
    print_table(["part", "ms", "of a step", "least on a rank", "most"], _parts(result), _parts_title(result))
    if result["collectives"]:
        head = ["group", "operation", "ranks", "calls", "MB a call", "ms alone", "bus GB/s"]
        print_table(head, _collectives(result), "Collectives of a step", left=head[:2])
    print_table(["Learn-Focus-Review itself", "ms a step"], _lfr(result), _lfr_title(result))
    head = ["rank", "node", "step ms", "waiting for data", "forward", "backward", "peak GB", "TFLOP/s of a product"]
    print_table(head, _ranks(result), "Ranks; a product is of two matrices, on all ranks at once", left=head[:2])


def _speed(result: dict[str, Any]) -> list[list[str]]:
    step, memory = result["step_seconds"], result["memory"]
    rows = [
        ["step, median (ms)", _ms(step["median"])],
        ["  95 % interval of the median", f"{_ms(step['low'])} to {_ms(step['high'])}"],
        ["  half of the steps", f"{_ms(step['q25'])} to {_ms(step['q75'])}"],
        ["tokens a second", f"{result['tokens_per_second']:,.0f}"],
        ["tokens a second and rank", f"{result['tokens_per_second_per_rank']:,.0f}"],
    ]
    for name, flops in result["flops"].items():
        mfu = "" if flops["mfu"] is None else f", {100 * flops['mfu']:.1f} % of the peak"
        rows.append([f"TFLOP/s a rank, {name}", f"{flops['tflops_per_rank']:.4g}{mfu}"])
    peak = "not known; give --peak-tflops"
    if result["peak_tflops"] is not None:
        peak = f"{result['peak_tflops']:g} ({result['peak_from']})"
    rows.append(["peak (TFLOP/s)", peak])
    rows.append([f"peak memory of {memory['of']} (GB)", f"{memory['peak_bytes'] / 1e9:.3f}"])
    rows.append(["  tensors, by estimate", f"{memory['estimated_bytes'] / 1e9:.3f}"])
    if (pipeline := result["pipeline"]) is not None:
        rows.append(["pipeline bubble, measured", f"{100 * pipeline['bubble_measured']:.1f} %"])
        rows.append(["pipeline bubble, ideal", f"{100 * pipeline['bubble_ideal']:.1f} %"])
    return rows


def _parts_title(result: dict[str, Any]) -> str:
    slower = result["traced_step_seconds"] / result["step_seconds"]["median"]
    return f"Parts of a step, mean over the ranks; steps that are timed part by part took {slower:.2f} of the others"


def _parts(result: dict[str, Any]) -> list[list[str]]:
    parts = result["parts"]
    total = parts[STEP]["mean"]
    return [
        [name, _ms(part["mean"]), f"{100 * part['mean'] / total:.1f} %", _ms(part["min"]), _ms(part["max"])]
        for name, part in parts.items()
    ]


def _collectives(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            row["group"],
            row["operation"],
            str(row["ranks"]),
            str(row["calls"]),
            f"{row['bytes'] / 1e6:.4g}",
            "-" if row["seconds_alone"] is None else _ms(row["seconds_alone"]),
            "-" if row["bus_gb_per_second"] is None else f"{row['bus_gb_per_second']:.4g}",
        ]
        for row in result["collectives"]
    ]


def _lfr_title(result: dict[str, Any]) -> str:
    lfr = result["lfr"]
    return f"Cost of choosing blocks, {lfr['blocks']:,} blocks, over the {lfr['steps_of_the_run']:,} steps of the run"


def _lfr(result: dict[str, Any]) -> list[list[str]]:
    lfr = result["lfr"]
    return [
        ["recording losses", _ms(lfr["recording_seconds"])],
        ["making orders", _ms(lfr["order_seconds"])],
        ["rescoring", _ms(lfr["rescoring_seconds"])],
        ["share of a step", f"{100 * lfr['share_of_step']:.3f} %"],
        ["sum of losses over ranks, beside the next step", _ms(lfr["losses_all_reduce_seconds_alone"])],
    ]


def _ranks(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(number),
            one["host"] or "-",
            _ms(one["traced_step_seconds"]),
            _ms(one["wait_seconds"]),
            _ms(one["parts"]["forward"]),
            _ms(one["parts"]["backward"]),
            f"{one['peak_memory_bytes'] / 1e9:.3f}",
            f"{one['matmul_tflops']:.4g}",
        ]
        for number, one in enumerate(result["by_rank"])
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}" if seconds < 0.1 else f"{1000 * seconds:.1f}"
