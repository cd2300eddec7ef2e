"""--ckpt-step, --no-load-optim and --no-load-rng: which saved step a command begins with, and what of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from megatron_lfr.cli import main
from megatron_lfr.run_folder import RunFolder
from support.folder_bytes import folder_bytes
from support.tiny_run import STOPPED, tiny_flags


@pytest.fixture(scope="module")
def saved(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Return the flags of a finished run that kept steps 4 and 8, and its folder. Changed by no test."""
    flags, folder = [*tiny_flags(corpus), "--save-interval-mins", "None"], tmp_path_factory.mktemp("saved") / "run"
    assert main(["train", *flags, "--save-retain-steps", "4", "8", "--save", str(folder)]) == 0
    return flags, folder


def test_a_new_run_starts_from_the_weights_of_a_step(
    saved: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = saved
    tune = [*flags, "--finetune", "--load", str(folder), "--save", str(tmp_path / "tuned"), "--lr", "1e-12"]
    assert (
        main(["train", *tune, "--ckpt-step", "4", "--no-load-optim", "--no-load-rng", "--exit-interval", "1"])
        == STOPPED
    )
    tuned = weights(tmp_path / "tuned", 1)
    assert largest_difference(tuned, weights(folder, 4)) < 1e-6
    assert largest_difference(tuned, weights(folder, 8)) > 1e-3
    capsys.readouterr()
    assert main(["train", *tune, "--ckpt-step", "5", "--save", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "--ckpt-step 5: " in said
    assert "there are: 4, 8" in said


def test_a_run_does_not_go_back(
    saved: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = saved
    before, last = folder_bytes(folder), RunFolder(folder).checkpoint().iteration
    assert main(["train", *flags, "--save", str(folder), "--ckpt-step", "8"]) == 2
    said = capsys.readouterr().err
    assert f"newest complete checkpoint at step {last}" in said
    assert f"megatron-lfr branch --from {folder} --at-step 8 --lr-schedule inherit --save NEW" in said
    assert folder_bytes(folder) == before
    assert main(["train", *flags, "--save", str(folder), "--ckpt-step", str(last)]) == 0


@pytest.mark.parametrize("flag", ["--no-load-optim", "--no-load-rng"])
def test_a_run_keeps_its_state(flag: str, tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *tiny_args, flag]) == 2
    assert f"{flag}: a run that goes on keeps its complete state" in capsys.readouterr().err


def weights(run: Path, step: int) -> dict[str, npt.NDArray[np.float32]]:
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for path in (run / f"checkpoints/iter_{step:07d}").glob("*.safetensors"):
        tensors |= {name: value for name, value in load_file(path).items() if not name.startswith("optimizer.")}
    return tensors


def largest_difference(one: dict[str, npt.NDArray[np.float32]], two: dict[str, npt.NDArray[np.float32]]) -> float:
    return max(float(abs(one[name] - two[name]).max()) for name in one)
