"""A run folder that is damaged, held, full or no run's: a command is refused, and changes no byte of it."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_lfr.cli import main
from megatron_lfr.lfr import Journal
from megatron_lfr.run_folder import RunFolder
from support.stopped_run import content, refusal

REFUSALS = ["--lr 0", "--save-interval 0", "--tokenizer-model nowhere.json", "--data-path nowhere"]


def test_no_refusal_changes_a_byte(
    trained: tuple[list[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refusals of every stage: flags, files, the disk, the lock, damaged checkpoints, a journal that was cut off."""
    args, _ = trained
    folder = tmp_path / "run"
    shutil.copytree(trained[1], folder)
    args = [*args, "--save", str(folder)]
    for flags in REFUSALS:
        before = content(folder)
        refusal([*args, *flags.split()], capsys)
        assert content(folder) == before, flags
    with (folder / "lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is training" in refusal(args, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        assert "GB free" in refusal(args, capsys)
    assert content(folder) == before
    for name, keep in (("journal/phase_000.npy", 140), ("metrics.jsonl", 10), ("journal/meta.json", 5)):
        path = folder / name
        content_before = path.read_bytes()
        path.write_bytes(content_before[:keep])
        before = content(folder)
        assert name in refusal(args, capsys)
        assert content(folder) == before, name
        path.write_bytes(content_before)
    meta = json.loads((folder / "journal/meta.json").read_text())
    (folder / "journal/meta.json").write_text(json.dumps(meta | {"format": 99}))
    before = content(folder)
    assert "meta.json: format 99: this version of megatron_lfr reads format 2" in refusal(args, capsys)
    assert content(folder) == before
    (folder / "journal/meta.json").write_text(json.dumps(meta))
    entries = np.load(folder / "journal/phase_000.npy")
    assert len(entries) == 64  # the run goes on after all that
    assert main(["train", *args, "--exit-interval", "9"]) == 75
    assert RunFolder(folder).history.entries[-1]["step"] == 8


DAMAGE = {
    "config.yaml is a folder": ("config.yaml", None, "config.yaml: is a folder"),
    "checkpoints is a file": ("checkpoints", b"", "checkpoints: is no folder"),
    "tensorboard is a file": ("tensorboard", b"", "tensorboard: is no folder"),
    "settings are a list": (
        "config_history.yaml",
        b"- {step: 0, folder: /, settings: [1]}",
        "expected a list of entries",
    ),
    "one value changed": (
        "config_history.yaml",
        b"- {step: 0, folder: /, changed: {lr: 1}}",
        "expected a list of entries",
    ),
    "code in YAML": ("config_history.yaml", b"!!python/object/apply:os.system [ls]", "config_history.yaml: not YAML"),
    "deep YAML": ("config_history.yaml", b"[" * 3000, "config_history.yaml: not YAML: maximum recursion depth"),
    "no segment": (
        "journal/meta.json",
        b'{"format": 2, "segments": []}',
        "meta.json: segments: expected a list of one or more",
    ),
    "deep JSON": ("journal/meta.json", b"[" * 100_000, "meta.json: not readable as JSON"),
    "another metrics.jsonl": ("metrics.jsonl", b"[" + b" " * 20_000 + b"]\n", "no line ends after"),
    "no metrics": ("metrics.jsonl", b"\xff\n" * 5000, "metrics.jsonl:1: not JSON"),
}


@pytest.mark.parametrize(("name", "replacement", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_no_runs_is_refused_before_anything_is_written(
    name: str,
    replacement: bytes | None,
    message: str,
    trained: tuple[list[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """replacement: what is in its place, None for a folder."""
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
    else:
        (folder / name).unlink()
    if replacement is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(replacement)
    before = content(folder)
    assert message in refusal(args, capsys)
    assert content(folder) == before


def test_a_checkpoint_knows_the_losses_that_led_to_it(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A journal of another run of the same settings makes the same orders until a Focus, and is not this run's."""
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    entries = np.load(path := folder / "journal/phase_000.npy")
    entries[3] += 0.25
    path.write_bytes(path.read_bytes()[:128] + entries.tobytes())
    before = content(folder)
    assert "its losses are not those that led to the checkpoint" in refusal(args, capsys)
    assert content(folder) == before


def test_a_checkpoint_under_another_number_is_refused(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    shutil.copytree(folder / "checkpoints/iter_0000008", folder / "checkpoints/iter_0000012")
    assert "state.json: belongs to step 8, but its folder's name to 12" in refusal(args, capsys)


def test_files_that_are_no_runs_are_not_replaced(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text("mine")
        assert f"{name} there is no run's" in refusal(tiny_args, capsys)
        assert content(tmp_path / "run") == {name: b"mine"}
        (tmp_path / "run" / name).unlink()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "not a folder" in refusal([*tiny_args, "--save", str(tmp_path / "link")], capsys)


def test_a_journal_that_leads_to_another_order_stays_as_it_is(tmp_path: Path) -> None:
    """The journal is replayed before it is cut back."""
    from megatron_lfr.lfr import Curriculum, preset

    plan = preset("lfr-v1").plan(40, 4, 8)

    def curriculum() -> Curriculum:
        return Curriculum(plan, Journal(tmp_path / "journal", {}), 1)

    first = curriculum()
    rng = np.random.default_rng(2)
    for step, _ in first.steps():
        first.record(step, rng.gamma(4, 1, 8).astype(np.float32), np.ones(8))
        if step == 6:  # in the first focus
            state = first.state_dict()
    first.state_dict()
    before = content(tmp_path)
    with pytest.raises(ValueError, match="replays to an order other than"):
        curriculum().load_state_dict(state | {"order_hash": "0" * 16})
    with pytest.raises(ValueError, match="replays to step 7, but the checkpoint is at 3"):
        curriculum().load_state_dict(state | {"step": 3})
    assert content(tmp_path) == before


def test_a_refused_new_run_leaves_nothing(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*tiny_args, "--save", str(tmp_path / "a/b")]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(["train", *args]) == 2
    assert not (tmp_path / "a").exists()
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/notes.txt").write_text("mine")
    before = content(tmp_path / "a")
    assert main(["train", *args]) == 2
    assert content(tmp_path / "a") == before


COMMANDS = ("evaluate --run", "convert to-hf --output hf --run", "inspect --hardest 1", "report")


def test_a_run_of_another_version_is_refused_and_one_without_a_version_is_read(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    monkeypatch.chdir(tmp_path)
    tuned = [*args, "--load", str(folder), "--finetune", "--save", str(tmp_path / "tuned")]
    for text, reason in (
        ('{"format": 2, "parent": "x"}', "run.json: format 2: this version of megatron_lfr reads format 1"),
        ("[1]", "run.json: not the description of a run"),
        ("[" * 100_000, "run.json: not the description of a run"),
    ):
        (folder / "run.json").write_text(text)
        before = content(tmp_path)
        for command in (["train", *args], ["train", *tuned], *([*words.split(), str(folder)] for words in COMMANDS)):
            assert main(command) == 2, command
            assert reason in capsys.readouterr().err, command
        assert content(tmp_path) == before
    (folder / "run.json").unlink()  # as runs were before it was written
    for words in COMMANDS:
        assert main([*words.split(), str(folder)]) == 0
    assert main(["train", *args, "--exit-interval", "9"]) == 75
    assert json.loads((folder / "run.json").read_text()) == {"format": 1}


def test_a_checkpoint_without_a_curriculum_is_no_run(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    from megatron_lfr.checkpoint import CheckpointStore

    CheckpointStore(folder / "checkpoints", keep=None).save(0, {}, {"source": "convert from-hf"})
    before = content(folder)
    assert "holds only weights, no run. Start a run from them with --load" in refusal(args, capsys)
    assert content(folder) == before
