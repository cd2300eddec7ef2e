"""What a run asks of the file system of its folder, tried in a folder of the doctor's own there."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.distributed import ProcessGroup

from megatron_lfr.fileio import describe, fsync_directory, write_atomic
from megatron_lfr.parallel import ranks

_MEGABYTES = 32
_VISIBLE_WITHIN = 3.0
"""Seconds for a file to appear on other nodes."""

NEEDED = {
    "locks": "two runs in one folder would not be kept apart",
    "rename": "a kill could leave half of a file under its name",
    "fsync": "a checkpoint would not survive a power cut",
    "mmap": "orders and corpora could not be read",
}
"""Ability → what is lost without it."""


@dataclass(frozen=True)
class FolderFacts:
    """The run folder as one node sees it."""

    kind: str
    """Type of the file system, with the mount's options on locks."""
    free_gb: float
    failures: dict[str, str]
    """Ability that is missing → the error."""
    write_mb_per_s: float
    """Of one file, until it is on the disk."""
    hard_links: bool


def check_folder(folder: Path) -> FolderFacts:
    """Try a run folder's file system from this process alone; `folder` exists. Leaves nothing behind."""
    scratch = folder / f".doctor-{os.uname().nodename}-{os.getpid()}"
    scratch.mkdir()
    try:
        checks: dict[str, Callable[[Path], None]] = {
            "locks": _try_locks,
            "rename": _try_rename,
            "fsync": fsync_directory,
            "mmap": _try_mmap,
        }
        failures = {name: error for name, check in checks.items() if (error := _error_of(check, scratch))}
        speed = _write_speed(scratch / "large")
        links = not _error_of(lambda path: (path / "link").hardlink_to(path / "large"), scratch)
        return FolderFacts(_mount(folder), shutil.disk_usage(folder).free / 1e9, failures, speed, links)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _error_of(check: Callable[[Path], None], scratch: Path) -> str:
    try:
        check(scratch)
    except OSError as error:
        return describe(error) or type(error).__name__
    return ""


def _try_locks(scratch: Path) -> None:
    with (scratch / "lock").open("ab") as one, (scratch / "lock").open("ab") as other:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise OSError("a file can be locked twice")


def _try_rename(scratch: Path) -> None:
    path = scratch / "renamed"
    for content in (b"before", b"after"):
        write_atomic(path, content)
    if path.read_bytes() != b"after":
        raise OSError("a file that was replaced has its old content")


def _try_mmap(scratch: Path) -> None:
    """As orders are shared: mapped, and read on after the name is gone."""
    path = scratch / "mapped.npy"
    np.save(path, np.arange(100_000))
    mapped = np.load(path, mmap_mode="r")
    path.unlink()
    if not np.array_equal(mapped, np.arange(100_000)):
        raise OSError("a mapped file has other content after it was removed")


def _write_speed(path: Path) -> float:
    content = np.random.default_rng(0).bytes(2**20)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(_MEGABYTES):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return _MEGABYTES * 2**20 / 1e6 / (time.perf_counter() - started)


def _mount(folder: Path) -> str:
    """Return the file system's type and those options of its mount that say how far locks reach."""
    path, best, kind = str(folder.resolve()), "", "unknown"
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, name, options = line.split()[:4]
        inside = point == "/" or path == point or path.startswith(point + "/")
        if inside and len(point) >= len(best):
            locks = [o for o in options.split(",") if "lock" in o]
            best, kind = point, " ".join([name, *locks])
    return kind


def nodes_that_share(folder: Path, leaders: list[int], group: ProcessGroup) -> tuple[list[bool], list[bool]]:
    """Return, for each node, whether it sees a file that rank 0 has just written, and whether it is kept out by rank
    0's lock; on every rank. leaders: a rank of each node; rank 0 is the first. Collective."""
    rank = ranks.rank()
    path = folder / ranks.from_first_rank(f".doctor-shared-{os.uname().nodename}-{os.getpid()}", group)
    sees, is_kept_out = rank == 0, rank == 0
    with ranks.failing_together(group):
        held = path.open("ab") if rank == 0 else None
        if held is not None:
            _lock(held.fileno())
    try:
        if rank != 0 and rank in leaders:
            sees = _appears(path)
            is_kept_out = sees and _is_locked(path)
        results = ranks.gather((sees, is_kept_out), group)
    finally:
        if held is not None:
            held.close()
            path.unlink(missing_ok=True)
    return [results[leader][0] for leader in leaders], [results[leader][1] for leader in leaders]


def _lock(descriptor: int) -> bool:
    """Lock a file. Returns False where another process has it, or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    with path.open("ab") as file:
        return not _lock(file.fileno())


def _appears(path: Path) -> bool:
    end = time.monotonic() + _VISIBLE_WITHIN
    while time.monotonic() < end:
        if path.exists():
            return True
        time.sleep(0.1)
    return False
