"""Saves that are killed, or that run out of space: the last complete checkpoint stays in force, the next save works."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lfr.checkpoint import CheckpointStore
from support import crash_cases
from support.checkpoint_samples import names, newest, no_file_above, save_filled, some_tensors, store_with
from support.waiting import LIMIT

Killed = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Return the folders that killed saves have left, and what they had reported."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "support.crash_cases", str(folder)]
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=LIMIT
    )
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout)


def assert_next_save_works(root: Path) -> None:
    last = newest(root)
    iteration = (last[0] if last else 0) + 1
    kept = [done for done in (iteration - 1, iteration) if done > 0]
    save_filled(CheckpointStore(root, crash_cases.KEEP), iteration, 9)
    assert newest(root) == (iteration, 9)
    folders = [f"iter_{done:07d}" for done in kept]
    assert names(root) == [*folders, "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("scenario", crash_cases.SCENARIOS)
def test_a_kill_before_any_change_on_disk_leaves_a_complete_checkpoint(killed: Killed, scenario: str) -> None:
    folder, report = killed
    before, iteration, fill = crash_cases.SCENARIOS[scenario]
    old = (before[-1], before[-1]) if before else None
    count = report["points"][scenario]
    after = [newest(folder / scenario / str(point)) for point in range(count)]
    assert set(after) == {old, (iteration, fill)}
    assert after == sorted(after, key=lambda state: state == (iteration, fill))  # once it is there, it stays
    assert newest(folder / scenario / str(count)) == (iteration, fill)
    for point in range(count + 1):
        assert_next_save_works(folder / scenario / str(point))


def test_the_kills_reach_each_half_done_state(killed: Killed) -> None:
    _, report = killed
    for scenario, beginning in [
        ("first", ".tmp-iter_"),
        ("next", ".tmp-pruned-iter_0000001"),
        ("over the only one", ".tmp-replaced-iter_0000001"),
    ]:
        assert any(name.startswith(beginning) for name in report["left"][scenario]), scenario


def test_a_save_in_the_background_changes_the_disk_in_the_same_steps(killed: Killed) -> None:
    _, report = killed
    assert report["points"]["in the background"] == report["points"]["next"]


def test_random_kills_leave_what_was_reported(killed: Killed) -> None:
    folder, report = killed
    assert len(report["reported"]) == crash_cases.RANDOM_KILLS
    for kill, reported in enumerate(report["reported"]):
        left = newest(folder / f"random-{kill}")
        assert left in ((reported, reported), (reported + 1, reported + 1))


def with_ballast(size: int) -> dict[str, torch.Tensor]:
    return {**some_tensors(2.0), "ballast": torch.zeros(size, dtype=torch.uint8)}


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    with no_file_above(100_000):
        yield


@pytest.mark.usefixtures("file_size_limit")
def test_a_file_that_cannot_be_written_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, keep=1)
    with pytest.raises(OSError, match="the checkpoint of iteration 2 could not be written in") as caught:
        store.save(2, with_ballast(400_000), {"fill": 2})
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert newest(tmp_path) == (1, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_old_checkpoints(small_disk: Path) -> None:
    """However much is free, so that each of the files is the one that does not fit."""
    root = small_disk / "checkpoints"
    store = store_with(root, 1, keep=1)
    filler = small_disk / "filler"
    failed = []
    for pages in range(12):
        filler.unlink(missing_ok=True)
        free = os.statvfs(small_disk)
        filler.write_bytes(bytes((free.f_bavail - pages) * free.f_bsize))
        try:
            store.save(2, some_tensors(2.0), {"fill": 2})
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            failed.append(pages)
            assert not list(root.glob(".*"))
            assert newest(root) == (1, 1)
        else:
            assert newest(root) == (2, 2)
            break
    assert failed == list(range(len(failed)))
    assert len(failed) >= 3
