"""Writing files so that a reader, or a run after a crash, never meets half of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def fsync_directory(path: Path) -> None:
    """Make the names inside `path` (creations, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` as one step: written aside, fsynced, renamed."""
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def append_file(path: Path, target: BinaryIO) -> None:
    """Append a file's bytes to an open file, copied by the kernel."""
    target.flush()
    with path.open("rb") as source:
        while os.sendfile(target.fileno(), source.fileno(), None, 1 << 30):
            pass
    target.seek(0, os.SEEK_END)
