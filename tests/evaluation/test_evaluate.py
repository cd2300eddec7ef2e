"""`megatron-lfr evaluate`: losses of a corpus."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from megatron_lfr.cli import main
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.engine import ForwardEngine
from megatron_lfr.evaluation.block_file import BlockFile
from support.ports import free_port
from support.text_run_oracle import SEQ, Oracle
from support.waiting import LIMIT


def evaluate(run: Path, *words: str) -> int:
    return main(["evaluate", "--run", str(run), *words])


def logged(run: Path, step: int) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    row: dict[str, Any] = next(row for row in rows if row["event"] == "evaluation" and row["step"] == step)
    return row


@pytest.mark.parametrize("iteration", [None, 10])
def test_it_gives_what_training_logged(
    run: Path, tmp_path: Path, iteration: int | None, forbid_drawing: Callable[[], None]
) -> None:
    forbid_drawing()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    chosen = [] if iteration is None else ["--iteration", str(iteration)]
    assert evaluate(run, "--json", str(tmp_path / "out.json"), *chosen) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    expected = logged(run, iteration or 20)
    assert results["iteration"] == expected["step"]
    assert (results["corpus"]["loss"], results["corpus"]["tokens"]) == (expected["loss"], expected["tokens"])
    assert {name: row["loss"] for name, row in results["corpus"]["domains"].items()} == expected["domains"]
    assert results["corpus"]["perplexity"] == math.exp(expected["loss"])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def block_losses(run: Path, oracle: Oracle, split: str) -> list[float]:
    """Return the mean loss of each block, from the oracle."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    source = getattr(BlockDataset(config["data_path"], SEQ, config["split"]), split)
    losses = []
    for block in range(source.num_blocks):
        row = source.read([block])[0].tolist()
        losses.append(-float(oracle.logprobs(row[:-1]).gather(1, as_column(row[1:])).mean()))
    return losses


def as_column(ids: list[int]) -> Any:
    import torch

    return torch.tensor(ids)[:, None]


@pytest.mark.parametrize("words", [["--split", "test"], ["--split", "test", "--batch-size", "3"]])
def test_per_block_losses_are_those_of_transformers(
    run: Path, oracle: Oracle, tmp_path: Path, words: list[str]
) -> None:
    for _ in range(2):  # the second time, it replaces its own
        assert evaluate(run, *words, "--per-block", str(tmp_path / "blocks.npy")) == 0
    losses = np.load(tmp_path / "blocks.npy", allow_pickle=False)
    expected = block_losses(run, oracle, "test")
    assert (losses.dtype, losses.shape) == (np.float32, (len(expected),))
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"blocks.npy", "blocks.npy.json"}


def test_another_corpus_is_taken_whole(run: Path, tmp_path: Path) -> None:
    prefix = str(run.parent / "toy_b_text_document")
    assert evaluate(run, "--data-path", prefix, "--per-block", str(tmp_path / "b.npy")) == 0
    assert len(np.load(tmp_path / "b.npy")) == BlockDataset([prefix], SEQ, "1").train.num_blocks


def test_a_failure_on_the_way_leaves_no_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = ForwardEngine.eval_step, []

    def fails(engine: ForwardEngine, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return original(engine, batch)

    monkeypatch.setattr(ForwardEngine, "eval_step", fails)
    assert evaluate(run, "--per-block", str(tmp_path / "blocks.npy")) == 2
    assert not list(tmp_path.iterdir())


def test_block_file_replaces_only_when_it_is_whole_and_described(tmp_path: Path) -> None:
    path, description = tmp_path / "x.npy", tmp_path / "x.npy.json"
    path.write_bytes(b"old")

    def describe(values: npt.NDArray[np.float32]) -> str:
        assert path.read_bytes() == b"old"
        return str(values.tolist())

    with BlockFile(path, 3, describe) as file:
        file.append(np.float32([1, 2]))
        assert path.read_bytes() == b"old"
        file.append(np.float32([3]))
    np.testing.assert_array_equal(np.load(path), np.float32([1, 2, 3]))
    assert description.read_text() == "[1.0, 2.0, 3.0]"

    def fails(_: object) -> str:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), BlockFile(path, 1, fails) as file:
        file.append(np.float32([4]))
    assert len(np.load(path)) == 3
    assert {one.name for one in tmp_path.iterdir()} == {"x.npy", "x.npy.json"}


@pytest.mark.slow
def test_two_ranks_share_the_work(run: Path, tmp_path: Path) -> None:
    items = [{"context": "the sun ", "choices": ["shines", "falls", "hills"], "answer": i % 3} for i in range(5)]
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["evaluate", "--run", str(run), "--tasks", str(task)]
    for folder in (one, two):
        folder.mkdir()
    assert main([*words, "--json", str(one / "out.json"), "--per-block", str(one / "b.npy")]) == 0
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ours = [*words, "--json", str(two / "out.json"), "--per-block", str(two / "b.npy")]
    done = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_lfr", *ours],
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=LIMIT) for process in done]
    assert [process.returncode for process in done] == [0, 0], said
    assert ["at iteration 20" in out for out, _ in said] == [True, False]
    np.testing.assert_allclose(np.load(two / "b.npy"), np.load(one / "b.npy"), atol=1e-6)
    a, b = (json.loads((folder / "out.json").read_text()) for folder in (one, two))
    assert a["corpus"]["loss"] == pytest.approx(b["corpus"]["loss"], abs=1e-6)
    assert a["tasks"] == b["tasks"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--iteration", "30"], "no checkpoint of iteration 30; there are: 10, 20"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--per-block", "nowhere/x.npy"], "--per-block nowhere/x.npy: its folder does not exist"),
        (["--per-block", "x.txt"], "must end in .npy"),
        (["--per-block", "{run}/order.npy"], "order.npy: holds something else already; remove it"),
        (
            ["--per-block", "{run}/quality.npy"],
            "quality.npy: holds something else already, as no quality.npy.json desc",
        ),
        (["--per-block", "{run}/b.npy", "--json", "{run}/b.npy.json"], "b.npy.json: is the description of --per-block"),
        (["--json", "{run}/config.yaml"], "config.yaml: holds something else already; remove it"),
        (["--json", "{run}"], "run: is a folder; name a file"),
        (["--split", "none"], "--split none: nothing is left to do"),
        (["--data-path", "nowhere/x"], "nowhere/x"),
        (["--tasks", "nowhere.jsonl"], "--tasks nowhere.jsonl: No such file"),
        (["--run", "nowhere"], "--run nowhere: not a run folder"),
    ],
)
def test_errors_name_what_is_wrong(
    run: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    np.save(tmp_path / "run" / "order.npy", np.zeros(3, np.int64))
    np.save(tmp_path / "run" / "quality.npy", np.zeros(3, np.float32))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert evaluate(tmp_path / "run", *(word.format(run=tmp_path / "run") for word in words)) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert re.search(message, capsys.readouterr().err)
