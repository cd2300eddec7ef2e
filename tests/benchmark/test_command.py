"""The command's own flags, comparisons, and sweeps."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lfr.benchmark import sweep
from megatron_lfr.benchmark.compare import differences, print_comparison
from megatron_lfr.benchmark.options import Options, take_options
from megatron_lfr.benchmark.statistics import ratio, summarize
from megatron_lfr.benchmark.sweep import parse_sweep, print_sweep, run_sweep
from megatron_lfr.cli import main
from megatron_lfr.estimate.results import read_result
from support.benchmark_cases import FLAGS


def result(times: list[float], **settings: Any) -> dict[str, Any]:
    """Return as much of a result as comparisons read."""
    return {
        "format": 1,
        "device": "cpu",
        "ranks": 2,
        "settings": settings,
        "step_seconds": summarize(times),
        "parts": {"forward": {"mean": float(np.mean(times)) / 3}, "waiting for data": {"mean": 0.0}},
    }


def test_flags_of_the_command_and_of_a_run() -> None:
    options, rest = take_options(["--steps", "7", "--lr", "1", "--json=x.json", "--warmup", "0", "--bf16"])
    assert (options.steps, options.warmup, options.json) == (7, 0, Path("x.json"))
    assert rest == ["--lr", "1", "--bf16"]
    assert take_options([]) == (Options(), [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "1"], "--steps 1: must be a number of at least 2"),
        (["--traced-steps", "x"], "--traced-steps x: must be a number of at least 1"),
        (["--sweep", "micro_batch=1,2"], "no setting of that name; did you mean micro_batch_size"),
        (["--sweep", "micro_batch_size"], "--sweep micro_batch_size: give NAME=VALUE,VALUE"),
        (["--against", "missing.json"], "missing.json"),
        ([*FLAGS, "--nproc-per-node", "3", "--tensor-model-parallel-size", "2"], "3 ranks (WORLD_SIZE) were started"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_result_replaces_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.json"
    path.write_text("[1]")
    assert main(["benchmark", *FLAGS, "--json", str(path)]) == 2
    assert "holds something else already" in capsys.readouterr().err
    assert path.read_text() == "[1]"


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2}', '{"format": 1, "step_seconds": {"all": [0]}}'])
def test_a_file_that_is_no_result_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^--against "):
        read_result(path, "--against")


def test_comparison(capsys: pytest.CaptureFixture[str], rng: np.random.Generator) -> None:
    old = rng.normal(1.0, 0.02, 40).tolist()
    faster = [0.8 * time for time in rng.normal(1.0, 0.02, 40)]
    middle, low, high = ratio(faster, old)
    assert 0.77 < low < middle < high < 0.83
    print_comparison(result(faster, bf16=True), result(old))
    text = capsys.readouterr().out
    assert "differs: bf16: default before, True now" in text
    assert "faster" in text
    print_comparison(result(old), result(old))
    assert "no difference that these steps show" in capsys.readouterr().out
    assert differences(result(old), result(old)) == []


def test_a_sweep_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Processes that fit, that run out of memory, that are refused, that are killed, and that fail otherwise."""
    outcomes: dict[str, tuple[int, str]] = {
        "1": (0, "a table"),
        "2": (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
        "4": (2, "megatron-lfr benchmark: error: --micro-batch-size 4: must divide"),
        "8": (-9, ""),
        "16": (
            1,
            "W1 x.py:3: UserWarning: slow\nTraceback\n[rank1]: torch.x.Unsupported: no\n====\nFAILED",
        ),
        "32": (
            2,
            "╭─ Invalid choice ─╮\n│ invalid choice 'x' for │\n│ argument '--y'. │\n│ ─── │\n│ More │\n╰─╯",
        ),
    }
    seen: list[list[str]] = []

    def start(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        code, text = outcomes[command[command.index("--micro-batch-size") + 1]]
        if code == 0:
            measured = {"tokens_per_second_per_rank": 5.0, "memory": {"peak_bytes": 1e9}}
            document = {**measured, "flops": {"causal": {"mfu": None}}}
            Path(command[command.index("--json") + 1]).write_text(json.dumps(document))
        return subprocess.CompletedProcess(command, code, text)

    monkeypatch.setattr(sweep.subprocess, "run", start)
    swept = parse_sweep("micro_batch_size=1,2,4,8,16,32 nproc_per_node=2 bf16=True")
    rows = run_sweep(swept, ["--lr", "1"], None)
    states = ["measured", "does not fit", "refused", "does not fit", "failed", "refused"]
    assert [row["state"] for row in rows] == states
    assert rows[2]["reason"] == "--micro-batch-size 4: must divide"
    assert rows[4]["reason"] == "[rank1]: torch.x.Unsupported: no"
    assert rows[5]["reason"] == "invalid choice 'x' for argument '--y'."
    assert all("--bf16" in command and "--nproc-per-node" in command for command in seen)
    print_sweep(rows)
    assert capsys.readouterr().out.count("does not fit") == 4  # as each ends, and in the table


def test_a_sweep_of_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes, of which one is refused; the JSON has both."""
    path = tmp_path / "sweep.json"
    short = ["--steps", "2", "--warmup", "0", "--traced-steps", "1"]
    assert main(["benchmark", *FLAGS, *short, "--sweep", "micro_batch_size=2,3", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    first, second = document["sweep"]
    assert first["state"] == "measured"
    assert first["result"]["settings"]["micro_batch_size"] == 2
    assert second["state"] == "refused"
    assert "--global-batch-size 8: must be a multiple of --micro-batch-size 3" in second["reason"]
    assert read_result_of(first["result"], tmp_path)["format"] == 1


def read_result_of(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write a result and read it as --against does."""
    path = folder / "result.json"
    path.write_text(json.dumps(document))
    return read_result(path, "--against")
