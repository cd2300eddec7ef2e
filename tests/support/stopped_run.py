"""A run that was asked to stop, which commands contradict, and what a refused command says and leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lfr.cli import main
from support.tiny_run import tiny_flags

FLAGS = ["--train-epochs", "0.5", "--lfr-schedule", "uniform", "--save-interval", "4", "--log-interval", "4"]


@pytest.fixture(scope="module")
def trained(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Return (flags, folder) of a run that was asked to stop at step 8, with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("identity") / "run"
    args = [*tiny_flags(corpus), *FLAGS, "--save", str(folder)]
    assert main(["train", *args, "--exit-interval", "8"]) == 75
    return args, folder


def content(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder, with the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["train", *args]) == 2
    return capsys.readouterr().err
