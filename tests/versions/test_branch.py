"""Branches: what they go on with, that their parent stays as it is, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing as mp

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.cli import main
from megatron_lfr.learning_rate import learning_rate_of
from megatron_lfr.run_folder import RunFolder
from support import kill_cases
from support.folder_bytes import folder_bytes
from support.same_run import assert_same_run, metrics_without_time
from support.tiny_run import tiny_flags
from support.two_ranks import train_two_ranks

CUT = 10
ZERO_1 = ["--deepspeed", f"--deepspeed-config={Path(__file__).parents[2] / 'examples' / 'deepspeed' / 'zero1.json'}"]
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the deepspeed extra is not installed")
DECAY = ["--lr-decay-style", "linear", "--min-lr", "1e-4"]


def flags(corpus: list[str], *more: str) -> list[str]:
    """Return the flags of a run, logged at each."""
    length = tiny_flags(corpus)
    at = length.index("--train-epochs")
    return [*length[:at], *length[at + 2 :], "--log-interval", "1", "--save-interval-mins", "None", *more]


@pytest.fixture(scope="module")
def parent(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of all phases, which keeps its step 10, in a Focus. Not to be written to."""
    folder = tmp_path_factory.mktemp("parent") / "main"
    assert main(["train", *lfr_flags(corpus), "--save", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def trunk(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of one phase at one rate. Not to be written to."""
    folder = tmp_path_factory.mktemp("trunk") / "main"
    retained = ["--save-retain-steps", str(CUT), "20"]
    assert (
        main(["train", *uniform_flags(corpus, 20), "--lr-decay-style", "constant", *retained, "--save", str(folder)])
        == 0
    )
    return folder


def lfr_flags(corpus: list[str]) -> list[str]:
    of_two_ranks = ["--make-vocab-size-divisible-by", "2"]
    return flags(corpus, "--train-iters", "20", "--save-retain-steps", str(CUT), *of_two_ranks)


def uniform_flags(corpus: list[str], steps: int) -> list[str]:
    return flags(corpus, "--lfr-schedule", "uniform", "--train-iters", str(steps), "--lr-warmup-iters", "3")


def branch(source: Path, save: Path, *how: str, step: int = CUT) -> int:
    how = how or ("--lr-schedule", "inherit")
    return main(["branch", "--from", str(source), "--at-step", str(step), "--save", str(save), *how])


def test_a_branch_goes_on_with_the_parents_bits(corpus: list[str], parent: Path, tmp_path: Path) -> None:
    before, save = folder_bytes(parent), tmp_path / "v1"
    assert branch(parent, save) == 0
    lineage = json.loads((save / "run.json").read_text())["parent"]
    checkpoint = f"checkpoints/iter_{CUT:07d}"
    manifest = (parent / checkpoint / "manifest.json").read_bytes()
    phases = sorted((save / "journal").glob("phase_*.npy"))
    losses = b"".join(np.load(path).tobytes() for path in phases)
    assert len(losses) == 4 * 8 * CUT
    assert lineage == {
        "folder": str(parent),
        "step": CUT,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "journal_sha256": hashlib.sha256(losses).hexdigest(),
    }
    for path in (parent / checkpoint).glob("*.safetensors"):
        assert path.samefile(save / checkpoint / path.name)
    assert main(["train", *lfr_flags(corpus), "--save", str(save)]) == 0
    assert_same_run(parent, save)
    assert RunFolder(save).settings_at(0) == RunFolder(parent).settings_at(0)
    assert folder_bytes(parent) == before
    page = tmp_path / "report.html"
    assert main(["report", str(save), "--output", str(page)]) == 0
    assert f"A branch of {parent} from step {CUT} on." in page.read_text()


@pytest.mark.parametrize(
    "layout",
    [
        ["--pipeline-model-parallel-size", "2"],
        ["--tensor-model-parallel-size", "2"],
        pytest.param(ZERO_1, marks=[pytest.mark.slow, NEEDS_DEEPSPEED]),
    ],
    ids=["pipeline", "tensor", "DeepSpeed ZeRO-1"],
)
def test_a_branch_goes_on_in_another_layout(layout: list[str], corpus: list[str], parent: Path, tmp_path: Path) -> None:
    before, save = folder_bytes(parent), tmp_path / "v1"
    assert branch(parent, save) == 0
    train_two_ranks([*lfr_flags(corpus), *layout, "--save", str(save)], tmp_path / "said")
    # Until the next Focus, whose order hangs on the last digits of the losses.
    one, two = ([row for row in metrics_without_time(run) if row["step"] < 15] for run in (parent, save))
    assert [row.get("order_hash") for row in two] == [row.get("order_hash") for row in one]
    np.testing.assert_allclose(*([row["loss"] for row in rows if "loss" in row] for rows in (one, two)), rtol=1e-4)
    assert folder_bytes(parent) == before


def test_a_decay_has_the_bits_of_one_run_with_it(corpus: list[str], trunk: Path, tmp_path: Path) -> None:
    before, save, end = folder_bytes(trunk), tmp_path / "v1", 16
    assert branch(trunk, save, *DECAY, "--train-iters", str(end)) == 0
    assert main(["train", "--config", str(save / "config.yaml")]) == 0
    wsd = ["--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear", "--lr-wsd-decay-iters", str(end - CUT)]
    one = tmp_path / "one"
    assert main(["train", *uniform_flags(corpus, end), *wsd, "--min-lr", "1e-4", "--save", str(one)]) == 0
    assert_same_run(one, save)
    rates = [row["lr"] for row in metrics_without_time(save) if row["event"] == "train"]
    left = np.arange(end - CUT - 1, -1, -1) / (end - CUT)
    np.testing.assert_allclose(rates[CUT:], 1e-4 + (1e-2 - 1e-4) * left, rtol=1e-12)
    assert folder_bytes(trunk) == before
    # What was trained can go on beyond the parent's end, too.
    assert branch(trunk, tmp_path / "v2", *DECAY, "--train-iters", "24", step=20) == 0


@pytest.mark.parametrize("style", ["cosine", "linear", "minus_sqrt", "exponential"])
def test_every_decay_is_complete(style: str, trunk: Path, tmp_path: Path) -> None:
    assert branch(trunk, tmp_path / "v1", "--lr-decay-style", style) == 0
    settings = RunFolder(tmp_path / "v1").recorded_settings
    rate = learning_rate_of(settings, RunFolder(tmp_path / "v1").plan()[0])
    assert rate(CUT - 1) == 1e-2
    assert 1e-2 > rate(CUT) > rate(15) > rate(19) == 0


def test_a_knee_and_steps_have_settings_of_their_own(trunk: Path, tmp_path: Path) -> None:
    def rates(save: Path, *how: str) -> list[float]:
        assert branch(trunk, save, "--lr-decay-style", *how, "--min-lr", "1e-4") == 0
        rate = learning_rate_of(RunFolder(save).recorded_settings, RunFolder(save).plan()[0])
        return [rate(step) for step in range(CUT - 1, 20)]

    knee = rates(tmp_path / "knee", "knee", "--lr-knee-explore", "0.6")
    assert knee == pytest.approx([*[1e-2] * 7, 7.525e-3, 5.05e-3, 2.575e-3, 1e-4])
    steps = ["--lr-step-shares", "0.3", "0.8", "--lr-step-factors", "0.5", "0"]
    assert rates(tmp_path / "steps", "multi-step", *steps) == [*[1e-2] * 4, *[5e-3] * 5, 1e-4, 1e-4]
    assert rates(tmp_path / "usual", "multi-step")[-4:] == pytest.approx([1e-2, 1e-2, 3.16e-3, 1e-3])


def refused(capsys: pytest.CaptureFixture[str], source: Path, save: Path, *how: str, step: int = CUT) -> str:
    """Return what a command says that is refused, and leaves nothing behind."""
    before = folder_bytes(source)
    capsys.readouterr()
    assert branch(source, save, *how, step=step) == 2
    assert folder_bytes(source) == before
    assert not list(save.parent.glob(".*partial"))
    return capsys.readouterr().err


def test_what_cannot_be_is_refused(
    parent: Path, trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "v1"
    assert "--at-step 7: " in (said := refused(capsys, parent, save, step=7))
    assert "there are: 10, 20" in said
    assert "lies in the parent's folder" in refused(capsys, parent, parent / "v1")
    assert "exists already" in refused(capsys, parent, trunk)
    (tmp_path / "empty").mkdir()
    assert "not a run folder" in refused(capsys, tmp_path / "empty", save)
    assert "decays already at step 10" in refused(capsys, parent, save, *DECAY)
    assert "either --lr-schedule inherit or" in refused(capsys, parent, save, "--lr-schedule", "inherit", *DECAY[:2])
    assert "phase 0 (learn) is trained, with 64 samples until step 8, where the schedule has 48" in _shortened(
        capsys, parent, save
    )
    assert "--train-iters 10: must be at least 11, as the branch goes on from step 10" in refused(
        capsys, trunk, save, *DECAY, "--train-iters", "10"
    )
    assert "--lr-knee-explore: goes with --lr-decay-style knee" in refused(
        capsys, trunk, save, *DECAY, "--lr-knee-explore", "0.1"
    )
    assert "--min-lr 1.0: must lie between 0 and --lr" in refused(capsys, trunk, save, *DECAY[:2], "--min-lr", "1")
    assert not save.exists()


def _shortened(capsys: pytest.CaptureFixture[str], parent: Path, save: Path) -> str:
    """Shorten a run whose phases are shares, at a rate that does not follow the length."""
    constant = with_decay_style("constant", parent, save.with_name("constant"))
    return refused(capsys, constant, save, "--lr-schedule", "inherit", "--train-iters", "16")


def with_decay_style(style: str, run: Path, to: Path) -> Path:
    """Copy a run as if it had been trained with this --lr-decay-style."""
    shutil.copytree(run, to)
    for name in ("config.yaml", "config_history.yaml"):
        text = (to / name).read_text()
        (to / name).write_text(re.sub("lr_decay_style: (cosine|constant)", f"lr_decay_style: {style}", text))
    return to


def test_another_length_does_not_change_rates_of_the_past(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cosine = with_decay_style("cosine", trunk, tmp_path / "cosine")
    said = refused(capsys, cosine, tmp_path / "v1", "--lr-schedule", "inherit", "--train-iters", "16")
    assert "the learning rate follows the run's length: step 4," in said  # after the warm-up


def test_a_journal_of_another_run_is_refused(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(parent, tmp_path / "main")
    with (other / "journal" / "phase_000.npy").open("r+b") as file:
        file.seek(128)
        file.write(np.float32(1.5).tobytes())
    assert "its losses are not those" in refused(capsys, other, tmp_path / "v1")


def test_without_links_tensors_are_copied_if_there_is_room(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", fails)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
        assert "GB needed" in refused(capsys, parent, tmp_path / "v1")
    assert branch(parent, tmp_path / "v1") == 0
    copied = CheckpointStore(tmp_path / "v1" / "checkpoints", keep=None).checkpoint(CUT)
    for path in copied.folder.glob("*.safetensors"):
        assert path.stat().st_nlink == 1
        assert path.read_bytes() == (parent / "checkpoints" / copied.folder.name / path.name).read_bytes()


def test_a_kill_leaves_no_branch(parent: Path, tmp_path: Path) -> None:
    before = folder_bytes(parent)
    mp.start_processes(kill_cases.kill_branches, (str(parent), CUT, str(tmp_path)), nprocs=1, start_method="forkserver")
    assert folder_bytes(parent) == before
    for number in range(len(kill_cases.BRANCH_MOMENTS)):
        save = tmp_path / str(number)
        assert not save.exists()
        assert branch(parent, save) == 0
        assert RunFolder(save).checkpoint().iteration == CUT
    assert folder_bytes(parent) == before
