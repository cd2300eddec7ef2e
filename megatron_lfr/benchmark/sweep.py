"""Benchmarks every combination of some settings, each in processes of its own: one that does not fit ends no other."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lfr.config import RunConfig
from megatron_lfr.output import did_you_mean, print_table

RANKS = "nproc_per_node"
_RAISED = re.compile(r"(\[rank\d+\]: )?([A-Za-z_]\w*\.)*[A-Z]\w*: ")
_OUT_OF_MEMORY = ("out of memory", "outofmemoryerror", "cannot allocate memory", "can't allocate memory")


def parse_sweep(text: str) -> dict[str, list[str]]:
    """Parse 'micro_batch_size=1,2,4 tensor_model_parallel_size=1,2' into the values of each setting. ValueError names
    what is no setting."""
    legal, swept = [*RunConfig().to_flat(), RANKS, "model_preset"], {}
    for word in text.split():
        name, equals, values = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if name not in legal:
            raise ValueError(f"--sweep {word}: no setting of that name{did_you_mean(name, legal)}")
        if not equals or not all(values.split(",")):
            raise ValueError(f"--sweep {word}: give NAME=VALUE,VALUE")
        swept[name] = values.split(",")
    if not swept:
        raise ValueError("--sweep: give NAME=VALUE,VALUE ...")
    return swept


def run_sweep(swept: dict[str, list[str]], argv: Sequence[str], local_ranks: int | None) -> list[dict[str, Any]]:
    """Benchmark all combinations. argv: the flags of all of them. Returns for each its `point`, a `state` (measured,
    refused, does not fit, failed), and the `result` or the `reason`."""
    rows = []
    for values in itertools.product(*swept.values()):
        point = dict(zip(swept, values, strict=True))
        row = {"point": point, **_run(_flags(point, argv, local_ranks))}
        rows.append(row)
        named = " ".join(f"{name}={value}" for name, value in point.items())
        print(f"{named}: {row['state']} {row.get('reason', '')}".rstrip(), flush=True)
    return rows


def _flags(point: dict[str, str], argv: Sequence[str], local_ranks: int | None) -> list[str]:
    ranks = point.get(RANKS, local_ranks)
    words = [*argv, *([] if ranks is None else ["--nproc-per-node", str(ranks)])]
    for name, value in point.items():
        flag = name.replace("_", "-")
        if name != RANKS:
            words += {"True": [f"--{flag}"], "False": [f"--no-{flag}"]}.get(value, [f"--{flag}", value])
    return words


def _run(flags: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, "-m", "megatron_lfr", "benchmark", *flags, "--json", str(path)]
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if process.returncode == 0:
            return {"state": "measured", "result": json.loads(path.read_bytes())}
    killed = process.returncode in (-9, 137)  # by the kernel, for memory
    if killed or any(text in process.stdout.lower() for text in _OUT_OF_MEMORY):
        return {"state": "does not fit", "reason": "killed" if killed else "out of memory"}
    unframed = (line.strip("│╭╮╰╯─= ") for line in process.stdout.splitlines())
    lines = [line for line in unframed if any(map(str.isalnum, line))]
    refusal = "megatron-lfr benchmark: error:"
    errors = [line.removeprefix(refusal).strip() for line in lines if line.startswith(refusal)]
    if errors:
        return {"state": "refused", "reason": errors[0]}
    if process.returncode == 2:  # the parser of flags says why in a box, below its title
        return {"state": "refused", "reason": " ".join(lines[1:3])}
    raised = [line for line in lines if _RAISED.match(line)]
    return {"state": "failed", "reason": (raised or lines[-1:] or [f"exit code {process.returncode}"])[0]}


def print_sweep(rows: list[dict[str, Any]]) -> None:
    """Print one row for each combination, the fastest first, then those without a result."""
    measured = [row for row in rows if row["state"] == "measured"]
    measured.sort(key=lambda row: -row["result"]["tokens_per_second_per_rank"])
    table = []
    for row in [*measured, *(row for row in rows if row["state"] != "measured")]:
        result = row.get("result")
        speed = ["-", "-", "-", row["state"]]
        if result is not None:
            mfu = result["flops"]["causal"]["mfu"]
            speed = [
                f"{result['tokens_per_second_per_rank']:,.0f}",
                "-" if mfu is None else f"{100 * mfu:.1f} %",
                f"{result['memory']['peak_bytes'] / 1e9:.2f}",
                "",
            ]
        table.append([*row["point"].values(), *speed])
    names = list(rows[0]["point"])
    print_table([*names, "tokens/s a rank", "MFU", "peak GB", ""], table, "Sweep", left=[*names, ""])
