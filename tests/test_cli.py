"""The command as a shell sees it."""

from __future__ import annotations

import importlib
import json
import pkgutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import megatron_lfr
from megatron_lfr import cli
from megatron_lfr.cli import main
from megatron_lfr.data.corpus.indexed import IndexedDataset


def test_every_module_imports() -> None:
    names = [module.name for module in pkgutil.walk_packages(megatron_lfr.__path__, "megatron_lfr.")]
    assert len(names) > 30
    needs = {"lm_eval_adapter": "lm_eval", "apex_adam": "apex"}  # packages of one's own choice
    left_out = [module for module, package in needs.items() if find_spec(package) is None]
    for name in names:
        if name.rpartition(".")[2] not in ["__main__", *left_out]:
            importlib.import_module(name)


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["trian"], 2)])
def test_usage(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    captured = capsys.readouterr()
    assert "preprocess" in captured.out + captured.err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-lfr {version('megatron_lfr')}\n"


@pytest.mark.parametrize("command", ["tokenizer", "preprocess", "train", "evaluate", "inspect", "commonness"])
def test_help_lists_the_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    flags = {
        "tokenizer": ["--input", "--output", "--vocab-size", "--json-key"],
        "preprocess": ["--input", "--workers"],
        "train": ["--data-path", "--lfr-schedule", "--config"],
        "evaluate": ["--run", "--per-block", "--tasks"],
        "inspect": ["--step", "--spikes", "--hardest"],
        "commonness": ["--reference-data-path", "--memory-gb", "--near-threshold"],
    }
    for flag in flags[command]:
        assert flag in out


@pytest.mark.parametrize(
    "words",
    [
        ["--local_rank=1", "train", "--save", "run"],
        ["--local-rank", "1", "train", "--save", "run"],
        ["--local_rank", "train", "--save", "run"],
        ["train", "--local_rank", "-1", "--save", "run"],
        ["train", "--save", "run", "--local-rank=0"],
        ["train", "--save", "run", "--local_rank", "0"],
    ],
)
def test_the_rank_that_launchers_add_is_dropped(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setitem(cli.COMMANDS, "train", lambda argv: given.append(list(argv)) or 0)
    assert main(words) == 0
    assert given == [["--save", "run"]]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_half_a_launcher_is_one_error(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.delenv("RANK", raising=False)
    assert main([command, "--load", "run", "--print-config"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-lfr {command}: error: [rank 0] the launcher's variables: WORLD_SIZE is set, and")
    assert "WORLD_SIZE=two" in error
    assert error.count("\n") == 1


def test_preprocess_then_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"document {i} " * 30, "domain": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prefix = str(tmp_path / "toy")
    flags = ["--input", str(tmp_path / "corpus.jsonl"), "--output-prefix", prefix, "--tokenizer", "bytes"]
    assert main(["preprocess", *flags, "--domain-key", "domain", "--workers", "1"]) == 0
    document = IndexedDataset(Path(prefix + "_a_text_document")).document(0)
    assert bytes(document[:-1].astype(np.uint8)).decode() == rows[0]["text"]
    train = [
        *("--model-preset", "demo", "--num-layers", "1", "--tokenizer-model", "bytes", "--seq-length", "64"),
        *("--data-path", f"{prefix}_a_text_document", f"{prefix}_b_text_document", "--split", "9,1,0"),
        *("--micro-batch-size", "8", "--train-iters", "10", "--save", str(tmp_path / "run"), "--lr", "1e-3"),
        *("--eod-mask-loss", "--reset-position-ids", "--reset-attention-mask"),
    ]
    assert main(["train", *train]) == 0
    assert "validation at step 10" in capsys.readouterr().out
