"""Makes the folder of results: all of it, or nothing. An older one is replaced if it holds nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_lfr.commonness.results import ARRAYS
from megatron_lfr.fileio import check_writable, fsync_directory, lock_file, new_folder

SUMMARY, PAGE = "commonness.json", "commonness.html"
KIND = "megatron-lfr commonness"
FORMAT = 1


def check_folder(path: Path) -> None:
    """Raise a ValueError where `--output` cannot be made, or exists and holds anything but earlier results."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path}: the folder {path.absolute().parent} does not exist")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"--output {path}: is no folder")
    if path.name in ("", "..") or path.is_mount():
        raise ValueError(f"--output {path}: cannot be replaced by the results; name a folder in it")
    check_writable("--output", path)
    if not path.exists() or not any(path.iterdir()):
        return
    names = [entry.name for entry in path.iterdir()]
    foreign = [name for name in names if name not in (SUMMARY, PAGE) and not _is_array(name)]
    if foreign or not _is_summary(path / SUMMARY):
        what = foreign[0] if foreign else f"no {SUMMARY} of this command"
        raise ValueError(f"--output {path}: is in use: holds {what}; give the name of a new folder")


@contextmanager
def results_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which replaces `path` once the block has ended without an error.

    ValueError where another process makes the same folder, and as `check_folder`.
    """
    lock = path.with_name(f".{path.name}.lock")
    with lock_file(lock, f"--output {path}: is in use: another process is making it"):
        try:
            check_folder(path)
            made, replaced = path.with_name(f".{path.name}.made"), path.with_name(f".{path.name}.replaced")
            if replaced.exists() and not path.exists():  # a process was killed between the two renames
                (made if made.exists() else replaced).rename(path)
            for left in (made, replaced):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with new_folder(made) as folder:
                yield folder
            if path.exists():
                path.rename(replaced)
            made.rename(path)
            fsync_directory(path.absolute().parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            lock.unlink()


def _is_array(name: str) -> bool:
    kind, _, rest = name.partition("_")
    return kind in ("document", "block") and rest.removesuffix(".json").removesuffix(".npy") in ARRAYS


def _is_summary(path: Path) -> bool:
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND
