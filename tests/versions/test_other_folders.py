"""Runs that are started, extended and branched in several folders, with relative paths."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from megatron_lfr.cli import main
from megatron_lfr.run_folder import RunFolder
from support.same_run import assert_same_run
from support.tiny_run import tiny_flags

LEARN = "- {kind: learn, duration: 0.5, unit: share}\n- {kind: review, duration: 0.5, unit: share}\n"


def flags(corpus: list[str], *more: str) -> list[str]:
    length = tiny_flags([os.path.relpath(prefix) for prefix in corpus])
    at = length.index("--train-epochs")
    constant = ["--lr-decay-style", "constant", "--log-interval", "1", "--save-interval-mins", "None"]
    return [*length[:at], *length[at + 2 :], *constant, "--save-retain-steps", "4", *more]


def go_on_as_printed(printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command that a branch's creation prints."""
    match = re.search(r"to go on: (?:cd (\S+) && )?megatron-lfr (train .*)", printed)
    assert match is not None
    if match[1] is not None:
        monkeypatch.chdir(match[1])
    assert main(match[2].split()) == 0


def test_branches_of_a_run_that_went_on_elsewhere(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "one/schedules"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    Path("schedules/mine.yaml").write_text(LEARN)
    words = flags(corpus, "--lfr-schedule", "schedules/mine.yaml", "--train-iters", "8")
    assert main(["train", *words, "--save", "../main"]) == 0
    begun = shutil.copytree("../main", tmp_path / "begun")
    monkeypatch.chdir(tmp_path / "two")
    assert main(["extend", "--run", "../main", "--train-iters", "+6", "--lfr-schedule", "uniform"]) == 0
    assert main(["train", "--config", "../main/config.yaml", "--save", "../main"]) == 0

    def branch(name: str, step: int, *how: str) -> Path:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        words = ["--at-step", str(step), "--lr-schedule", "inherit", "--save", name, *how]
        assert main(["branch", "--from", "main", *words]) == 0
        go_on_as_printed(capsys.readouterr().out, monkeypatch)
        return tmp_path / name

    assert_same_run(tmp_path / "main", branch("extended", 8))
    assert_same_run(begun, branch("before", 4))
    # One whose last segment was described in the first folder, while it leaves after that was left.
    short = branch("short", 8, "--train-iters", "8")
    assert RunFolder(short).identity() == RunFolder(begun).identity()
    monkeypatch.chdir(tmp_path)
    assert main(["extend", "--run", "short", "--train-iters", "+6", "--lfr-schedule", "uniform"]) == 0
    monkeypatch.chdir("/")
    assert main(["train", "--config", str(short / "config.yaml"), "--save", str(short)]) == 0
    assert_same_run(tmp_path / "main", short)
    # Other phases, of a file that is given here.
    (tmp_path / "mine.yaml").write_text(LEARN.replace("review", "learn"))
    arm = branch("arm", 4, "--lfr-schedule", "mine.yaml")
    kinds = [phase.phase.kind for phase in RunFolder(arm).plan()[0].phases]
    assert kinds == ["learn", "learn"]
