"""Runs that train adapters: what they save, what they go on from, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lfr.checkpoint.manifest import NAME, record_file
from megatron_lfr.cli import main
from support.same_run import assert_same_run, metrics_without_time
from support.tiny_run import STOPPED, tiny_flags

ADAPTED = ["--finetune", "--lora-rank", "3", "--lora-alpha", "6", "--lora-target", "q,v,down", "--lr", "1e-2"]
RITE = ["--optimizer", "lora-rite", "--clip-grad", "0"]


@pytest.fixture(scope="module")
def base(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    assert main(["train", *tiny_flags(corpus), "--save", str(folder), "--exit-interval", "3"]) == STOPPED
    return folder


def checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("iter_*"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in checkpoint(folder).glob("*.safetensors") for n, t in load_file(file).items()}


def adapt(args: list[str], base: Path, save: Path, *more: str) -> int:
    flags = [*args, "--load", str(base), "--save", str(save), *ADAPTED, "--train-epochs", "1", *more]
    return main(["train", *flags])


@pytest.mark.parametrize("optimizer", [[], RITE], ids=["adamw", "lora-rite"])
def test_a_run_of_adapters_saves_them_alone_and_resumes_bit_for_bit(
    optimizer: list[str], tiny_args: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once, stopped = tmp_path / "at_once", tmp_path / "stopped"
    assert adapt(tiny_args, base, at_once, *optimizer) == 0
    out = capsys.readouterr().out
    # (32 + 32) + (32 + 16) + (64 + 32) inputs and outputs
    assert f"adapters of rank 3 (q v down): {2 * 3 * 208:,} weights are trained" in out
    assert adapt(tiny_args, base, stopped, *optimizer, "--exit-interval", "4") == STOPPED
    assert adapt(tiny_args, base, stopped, *optimizer) == 0
    assert "was only used at its start" not in capsys.readouterr().out
    assert_same_run(stopped, at_once)
    tensors = stored(at_once)
    assert tensors
    assert all(".lora." in name for name in tensors if name != "optimizer.step")
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    assert sum(tensor.numel() for tensor in weights.values()) == 2 * 3 * 208
    assert all(tensor.any() for tensor in weights.values())  # B has left 0
    losses = [row["loss"] for row in metrics_without_time(at_once) if row["event"] == "evaluation"]
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_a_run_names_its_base_and_refuses_another(
    tiny_args: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    assert adapt(tiny_args, base, folder, "--exit-interval", "2") == STOPPED
    shutil.copytree(base, other)
    assert adapt(tiny_args, other, folder, "--exit-interval", "3") == STOPPED  # a copy is the same base
    file = next(checkpoint(other).glob("*.safetensors"))
    tensors = load_file(file)
    name = min(name for name in tensors if name.startswith("model."))
    tensors[name][0] += 1
    save_file(tensors, file)
    manifest = json.loads((checkpoint(other) / NAME).read_text())
    manifest["files"][file.name] = vars(record_file(file))
    (checkpoint(other) / NAME).write_text(json.dumps(manifest))
    capsys.readouterr()
    for flags, message in (
        (["--load", str(other)], f"--load {other}, the run has {base}"),
        (["--lora-rank", "2"], "--lora-rank 2, the run has 3"),
        (["--lora-alpha", "1"], "--lora-alpha 1.0, the run has 6.0"),
        (["--lora-target", "all"], "--lora-target all, the run has q,v,down"),
        (["--lora-rank", "None"], "--lora-rank none, the run has 3"),
        (["--load", str(folder), "--save", str(tmp_path / "more")], "holds adapters alone, no model to start from"),
        (["--load", str(tmp_path / "none")], "holds no checkpoint"),
    ):
        assert adapt(tiny_args, base, folder, *flags) == 2
        assert message in capsys.readouterr().err


def test_a_run_starts_from_the_adapters_of_another(
    tiny_args: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert adapt(tiny_args, base, first, "--exit-interval", "4") == STOPPED
    given = ["--lora-load", str(first), "--lr", "1e-9"]
    assert adapt(tiny_args, base, second, *given, "--exit-interval", "1") == STOPPED
    assert f"they start as those of --lora-load {first}" in capsys.readouterr().out
    before, after = stored(first), stored(second)
    for name, weight in before.items():
        if name.startswith("model."):
            assert weight.any()
            torch.testing.assert_close(after[name], weight, atol=1e-8, rtol=0)
        else:  # moments of one step, of which this is the first
            assert not torch.equal(after[name], weight)
    assert adapt(tiny_args, base, second, *given, "--exit-interval", "2") == STOPPED  # which goes on from its own
    assert "they start as" not in capsys.readouterr().out
    other = tmp_path / "other"
    assert main(["train", *tiny_args, "--save", str(other), "--exit-interval", "1"]) == STOPPED
    for flags, message in (
        (["--lora-load", str(base)], f"--lora-load {base}: holds no adapters; give a run with --lora-rank"),
        (["--lora-load", str(tmp_path / "none")], "--lora-load"),
        (["--lora-load", str(first), "--lora-rank", "2"], "others: --lora-rank 2, the run has 3"),
        (["--lora-load", str(first), "--lora-target", "all"], "others: --lora-target all, the run has q,v,down"),
        (["--lora-load", str(first), "--load", str(other)], f"others: --load {other}, the run has {base}"),
        (["--lora-load", str(first), "--lora-rank", "None"], f"--lora-load {first}: goes with --lora-rank"),
    ):
        assert adapt(tiny_args, base, tmp_path / "third", *flags) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "third").exists()


def test_evaluation_has_the_runs_losses(
    tiny_args: list[str],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(base.parent)
    folder = tmp_path / "run"
    assert adapt(tiny_args, Path(base.name), folder, "--eval-iters", "None") == 0  # a relative path
    rows = [row for row in metrics_without_time(folder) if row["event"] == "evaluation"]
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--run", str(folder), "--json", str(tmp_path / "losses.json")]) == 0
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses["corpus"]["loss"] == pytest.approx(rows[-1]["loss"], abs=1e-6)
    assert main(["convert", "to-hf", "--run", str(folder), "--output", str(tmp_path / "hf")]) == 2
    assert "holds adapters; --merge adds them to their base" in capsys.readouterr().err
