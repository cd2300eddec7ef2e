"""A run folder's surroundings: paths from elsewhere, file systems without locks, and what another machine left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lfr.cli import main
from megatron_lfr.fileio import lock_file
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.start import Start, open_journal
from support.stopped_run import FLAGS, refusal
from support.tiny_run import tiny_flags


def test_relative_paths_are_found_from_elsewhere(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    for prefix in corpus:
        for suffix in (".bin", ".idx"):
            shutil.copy(prefix + suffix, home / "data")
    names = [f"data/{Path(prefix).name}" for prefix in corpus]
    (home / "blend.txt").write_text(f"1 {names[0]} 2 {names[1]}")
    rest = tiny_flags(corpus)[3:]
    monkeypatch.chdir(home)
    assert main(["train", *rest, *FLAGS, "--exit-interval", "2", "--data-path", *names, "--save", "plain"]) == 75
    args = [*rest, *FLAGS, "--exit-interval", "2", "--data-args-path", "blend.txt", "--save", "blend"]
    assert main(["train", *args]) == 75
    for folder in (tmp_path, home):
        monkeypatch.chdir(folder)
        for name in ("plain", "blend"):
            assert main(["evaluate", "--run", str(home / name)]) == 0
            assert main(["inspect", str(home / name), "--hardest", "1"]) == 0
    monkeypatch.chdir(tmp_path)
    (home / "data").rename(tmp_path / "data")  # moved, and now found from the present folder
    assert main(["inspect", str(home / "plain"), "--hardest", "1"]) == 0
    (tmp_path / "data").rename(tmp_path / "gone")
    capsys.readouterr()
    assert main(["inspect", str(home / "plain"), "--hardest", "1"]) == 2
    assert f"--data-path {home}/{names[0]}" in capsys.readouterr().err
    assert f"{names[0]}.idx: no such file, looked for from {tmp_path}" in refusal(
        [*rest, *FLAGS, "--data-path", *names, "--save", "new"], capsys
    )


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunFolder(tmp_path / "run").hold():
        pass
    assert "no locks on this file system" in capsys.readouterr().err


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path, "held")
    with pytest.raises(ValueError, match="held"):
        lock_file(path, "held")
    path.unlink()
    second = lock_file(path, "held")
    assert path.stat().st_ino == os.fstat(second.fileno()).st_ino
    first.close()
    second.close()


def test_another_machines_old_journal_does_not_block_a_new_run(tmp_path: Path) -> None:
    """A machine that is not the first keeps a copy, which is sent anew."""
    nodes: Any = SimpleNamespace(index=1, is_leader=True)
    start = Start(None, None, 0)
    for seed in (1, 2):
        journal = open_journal(RunFolder(tmp_path / "run"), nodes, {"seed": seed}, start, tmp_path / "scratch")
        assert journal is not None
        journal.begin_phase(0)
        journal.close()
    assert json.loads((journal.folder / "meta.json").read_text()) == {"seed": 2}
    assert not (tmp_path / "run").exists()
