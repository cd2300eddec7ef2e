"""Checkpoints that are kept whatever --keep-last says."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.cli import main


def test_retained_checkpoints_are_written_and_kept(tiny_args: list[str], tmp_path: Path) -> None:
    by_clock = ["--save-interval-mins", "None"]
    retain = [
        "--save-interval",
        "2",
        "--keep-last",
        "1",
        "--save-retain-interval",
        "4",
        "--save-retain-steps",
        "3",
        "5",
    ]
    assert main(["train", *tiny_args, *by_clock, *retain, "--exit-interval", "10"]) == 75
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=None)
    assert store.iterations() == [3, 4, 5, 8, 10]
    assert store.checkpoint(3).iteration == 3
    # A run that goes on without them drops all but the newest at its next checkpoint.
    assert main(["train", *tiny_args, *by_clock, "--keep-last", "1", "--exit-interval", "11"]) == 75
    assert store.iterations() == [11]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save-retain-interval", "0"], "--save-retain-interval 0: must be at least 1"),
        (["--save-retain-steps", "5", "0"], "--save-retain-steps 0: must be at least 1"),
        (["--save-retain-steps", "5", "10000"], "--save-retain-steps 10000: must lie between 1 and "),
    ],
)
def test_steps_that_no_checkpoint_can_have_are_refused(
    flags: list[str], message: str, tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny_args, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
