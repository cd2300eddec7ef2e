"""Settings that may change while a run goes on: printed, and recorded with the step from which they hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_lfr.cli import main
from megatron_lfr.run_folder import RunFolder
from support.stopped_run import FLAGS, content, refusal


def test_a_setting_that_changes_is_printed_and_recorded(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, path = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], path)
    assert main(["train", *args, "--lr", "0.5", "--exit-interval", "12"]) == 75
    out = capsys.readouterr().out
    assert "settings that change from step 8 on: --lr 0.01 -> 0.5, --exit-interval 8 -> 12" in out
    last = RunFolder(path).history.entries[-1]
    assert (last["step"], last["changed"]) == (8, {"lr": [0.01, 0.5], "exit_interval": [8, 12]})
    assert RunFolder(path).recorded_settings["lr"] == 0.5
    shutil.rmtree(path / "checkpoints/iter_0000012")
    shutil.rmtree(path / "checkpoints/iter_0000008")
    assert main(["train", *args, "--lr", "0.25", "--exit-interval", "8"]) == 75  # from step 4: what came later goes
    folder = RunFolder(path)
    assert [(entry["step"], entry.get("changed")) for entry in folder.history.entries] == [
        (0, None),
        (4, {"lr": [0.01, 0.25]}),
    ]
    assert folder.settings_at(3)["lr"] == 0.01
    assert folder.settings_at(4)["lr"] == 0.25
    (path / "config_history.yaml").unlink()
    folder = RunFolder(path)
    assert folder.settings_at(4)["lr"] == 0.25
    assert folder.changes({"lr": 0.5}, 4, {}) == {"lr": [0.25, 0.5]}


def test_the_loss_may_change_and_the_cap_of_the_logits_may_not(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a run that is older than these settings: neither its facts nor its config.yaml knows them."""
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], RunFolder(tmp_path / "run")
    shutil.copytree(trained[1], folder.path)
    assert "final_logit_softcapping" not in json.loads((folder.path / "journal/meta.json").read_text())["model"]
    first, *later = folder.history.entries
    for name in ("final_logit_softcapping", "z_loss_coeff", "label_smoothing"):
        del first["settings"][name]
    (folder.path / "config_history.yaml").write_text(yaml.safe_dump([first, *later]))
    (folder.path / "config.yaml").write_text(yaml.safe_dump(first["settings"]))
    assert "--final-logit-softcapping 30.0, the run has none" in refusal(
        [*args, "--final-logit-softcapping", "30"], capsys
    )
    tune = [*args, "--load", str(folder.path), "--finetune", "--save", str(tmp_path / "tuned")]
    tune += ["--final-logit-softcapping", "30", "--exit-interval", "1"]
    assert "--final-logit-softcapping 30.0, the run has none" in refusal(tune, capsys)
    assert main(["train", *tune, "--finetune-change", "final_logit_softcapping"]) == 75
    capsys.readouterr()
    assert main(["train", *args, "--exit-interval", "9", "--z-loss-coeff", "0.01", "--label-smoothing", "0.1"]) == 75
    assert "--z-loss-coeff 0.0 -> 0.01, --label-smoothing 0.0 -> 0.1" in capsys.readouterr().out
    after = RunFolder(folder.path)
    assert (after.settings_at(7).get("z_loss_coeff"), after.settings_at(8)["z_loss_coeff"]) == (None, 0.01)


def test_a_setting_that_the_version_before_did_not_have_was_its_default(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, path = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], path)
    history = yaml.safe_load((path / "config_history.yaml").read_text())
    for name in ("finetune_change", "eval_iters"):
        del history[0]["settings"][name]
    (path / "config_history.yaml").write_text(yaml.safe_dump(history))
    assert main(["train", *args, "--exit-interval", "8", "--eval-iters", "7"]) == 0
    assert "settings that change from step 8 on: --eval-iters 100 -> 7\n" in capsys.readouterr().out


def test_a_finished_run_stays_as_it_is(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*tiny_args, *FLAGS]
    assert main(["train", *args]) == 0
    before = content(tmp_path / "run")
    assert main(["train", *args, "--lr", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "these settings have no effect any more: --lr 0.01 -> 0.5" in out
    assert content(tmp_path / "run") == before


def test_a_run_without_a_checkpoint_says_that_it_starts_anew(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    shutil.rmtree(folder / "checkpoints")
    before = content(folder)
    assert "--seed 5, the run has 1234" in refusal([*args, "--seed", "5"], capsys)
    assert content(folder) == before
    assert main(["train", *args, "--exit-interval", "2"]) == 75
    out = capsys.readouterr().out
    assert "stopped before its first checkpoint and starts anew; the 64 losses in its journal" in out
    shutil.rmtree(folder / "checkpoints")
    for path in (folder / "journal").glob("phase_*"):
        path.unlink()  # nothing was trained: another run may begin here
    assert main(["train", *args, "--exit-interval", "2", "--seed", "5"]) == 75
    assert "losses" not in capsys.readouterr().out.split("phase 0")[0]
    assert json.loads((folder / "journal/meta.json").read_text())["seed"] == 5
