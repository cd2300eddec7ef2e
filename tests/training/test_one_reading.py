"""Each command reads a run's files, and loads its tokenizer, once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from megatron_lfr.cli import main
from megatron_lfr.data.corpus.tokenizer import FileTokenizer
from support.tiny_run import STOPPED, tiny_flags

FILES = ("config.yaml", "config_history.yaml", "metrics.jsonl")


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of a run was read, and a tokenizer was loaded, so far."""
    counts: Counter[str] = Counter()
    read_bytes, load = Path.read_bytes, FileTokenizer.__init__

    def counted_reading(path: Path) -> bytes:
        counts[path.name] += path.name in FILES
        return read_bytes(path)

    def counted_loading(tokenizer: FileTokenizer, *arguments: Any, **named: Any) -> None:
        counts["tokenizer"] += 1
        load(tokenizer, *arguments, **named)

    monkeypatch.setattr(Path, "read_bytes", counted_reading)
    monkeypatch.setattr(FileTokenizer, "__init__", counted_loading)
    return counts


def test_each_command_reads_once(corpus: list[str], tmp_path: Path, readings: Counter[str]) -> None:
    vocabulary = {"</s>" if number == 63 else f"t{number}": number for number in range(64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run, hf = str(tmp_path / "run"), str(tmp_path / "hf")
    train = ["train", *tiny_flags(corpus), "--tokenizer-model", str(tmp_path / "tokenizer.json"), "--save", run]
    train += ["--train-epochs", "0.5", "--lfr-schedule", "uniform", "--eval-iters", "1"]
    settings = {"tokenizer": 1, "config.yaml": 1, "config_history.yaml": 1}
    for words, code, expected in (
        ([*train, "--exit-interval", "2"], STOPPED, {"tokenizer": 1}),
        ([*train, "--exit-interval", "4"], STOPPED, {"tokenizer": 1, "config_history.yaml": 1, "metrics.jsonl": 1}),
        (["evaluate", "--run", run, "--split", "valid"], 0, settings),
        (["convert", "to-hf", "--run", run, "--output", hf], 0, settings),
        (["convert", "from-hf", "--input", hf, "--output", str(tmp_path / "back")], 0, {"tokenizer": 1}),
    ):
        readings.clear()
        assert main(words) == code
        assert +readings == expected, words
