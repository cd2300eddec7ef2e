"""`megatron-lfr estimate versions`: the method's table, and what steps amount to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_lfr.cli import main

RUN = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--vocab-size", "128"),
    *("--seq-length", "32", "--global-batch-size", "8", "--blocks", "5000", "--lfr-schedule", "uniform"),
]


def estimated(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["estimate", "versions", *RUN, *more, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_methods_table(capsys: pytest.CaptureFixture[str]) -> None:
    result = estimated(capsys, "--train-iters", "8000", "--versions", "8", "--branch-share", "0.6")
    shares = {int(n): round(100 * row["path_switching"]) for n, row in result["shares_by_versions"].items()}
    assert shares == {1: 100, 2: 87, 3: 70, 4: 58, 5: 49, 6: 43, 7: 38, 8: 34}


def test_both_readings_of_the_main_paths_end(capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["--train-iters", "4000", "--versions", "4"]
    ways = estimated(capsys, *plain, "--branch-share", "0.6", "--tokens-per-second", "1000")["ways"]
    assert {way: row["steps"] for way, row in ways.items()} == {
        "from_scratch": 10_000,
        "continual": 4000,
        "path_switching": 5800,
        "path_switching_to_the_end": 6400,
    }
    assert ways["path_switching"]["share"] == 0.58
    assert ways["path_switching"]["tokens"] == 5800 * 8 * 32
    assert ways["path_switching"]["seconds"] == 5800 * 8 * 32 / 1000
    # A run of as many steps takes as many operations.
    capsys.readouterr()
    assert main(["estimate", *RUN, "--train-iters", "5800", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)["total"]
    assert (one["tokens"], one["flops"]) == (ways["path_switching"]["tokens"], ways["path_switching"]["flops"])
    for share in ("0.44", "0.45", "0.46"):
        other = estimated(capsys, *plain, "--branch-share", share)["ways"]["path_switching_to_the_end"]
        assert 0.57 < other["share"] < 0.59


def test_the_tables_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["estimate", "versions", *RUN, "--train-iters", "4000", "--versions", "4", "--branch-share", "0.6"]
    assert main([*command, "--tokens-per-second", "1000"]) == 0
    said = capsys.readouterr().out
    assert "which leave the main path after steps 400, 1400, 2400, 3400" in said
    assert "5,800" in said
    assert "0:24:45" in said
    assert main(["estimate", "versions", *RUN, "--train-iters", "4000"]) == 2
    assert "give --versions and --branch-share" in capsys.readouterr().err
