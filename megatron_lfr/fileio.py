"""Writing files so that a reader, or a run after a crash, never sees half of one; keeping other processes out."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import shutil
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def describe(error: BaseException) -> str:
    """Return the message of an error, without the number that Python puts before that of an OSError."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def fsync_directory(path: Path) -> None:
    """Make the names inside `path` (creations, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step: write a temporary file, fsync it, rename it."""
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


def map_array(path: Path) -> npt.NDArray[Any]:
    """Map the array of an .npy file into memory, to be read; nothing is unpickled. ValueError for a file that is none,
    damaged, cut short or of objects, OSError for one that cannot be read."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (tokenize.TokenError, SyntaxError, TypeError, OverflowError) as error:
        # Of a header: NumPy looks for Python 2's integers in it, and takes what it then says for a shape.
        raise ValueError(f"cannot parse its header: {error.args[0]}") from None


def json_value(value: Any) -> Any:
    """Return a value as JSON can hold it, also within lists and dictionaries: NaN and infinity become None (null),
    NumPy's numbers become Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets the name `final` when the block has ended without an error and all of it is on
    the disk; after an error it is removed. A kill leaves a hidden folder beside it, which the next attempt removes.

    Raises ValueError where `final` exists.
    """
    if final.exists() or final.is_symlink():
        raise ValueError(f"{final}: exists already; give the name of a new folder")
    aside = final.with_name(f".{final.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for folder, _, names in os.walk(aside):
            for name in names:
                fsync_file(Path(folder, name))
            fsync_directory(Path(folder))
        aside.rename(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_directory(final.parent)


def check_replaces(flag: str, path: Path, *begins: bytes) -> None:
    """Raise ValueError that names `flag` where a file cannot be made as `path`, or would replace a file that is not an
    earlier result, as it begins with none of `begins`."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: its folder does not exist")
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name a file")
    if path.is_symlink() or (path.exists() and not path.is_file()):  # a replaced /dev/stdout is gone for everybody
        raise ValueError(f"{flag} {path}: is no regular file, and would be replaced; name a file")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if not file.read(max(map(len, begins))).startswith(begins):
                raise ValueError(f"{flag} {path}: holds something else already; remove it, or give another name")
    check_writable(flag, path)


def check_can_be_folder(flag: str, path: Path) -> None:
    """Raise ValueError that names `flag` where there can be no folder `path`, as something else is in its place, or in
    that of one of those that it would be in, and OSError where nothing can be written there."""
    existing = next(one for one in (path.absolute(), *path.absolute().parents) if os.path.lexists(one))
    if not existing.is_dir():
        raise ValueError(f"{flag} {path}: {existing} is no folder")
    _check_folder_writable(flag, path, existing)


def check_writable(flag: str, path: Path) -> None:
    """Raise OSError that names `flag` where nothing can be written beside `path`, or into the first folder that there
    is of those that it would be in."""
    _check_folder_writable(flag, path, next(folder for folder in path.absolute().parents if folder.is_dir()))


def _check_folder_writable(flag: str, path: Path, folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, f"{flag} {path}: cannot write into {folder}: {error.strerror}") from None


def check_space(flag: str, path: Path, needed: int, what: str | None = None) -> None:
    """Raise OSError that names `flag` where `needed` bytes, of `what`, do not fit into `path`, which need not exist."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        purpose = f" for {what}" if what else ""
        raise OSError(f"{flag} {path}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed{purpose}")


def lock_file(path: Path, otherwise: str) -> BinaryIO:
    """Create the file `path` and lock it until the file is closed or the process ends.

    Raises ValueError with the text `otherwise` where another process holds the lock. On a file system without locks
    (some NFS and Lustre mounts), a line on stderr says so and there is no protection.
    """
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(otherwise) from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                print(f"{path.parent}: no locks on this file system; run no two processes in it", file=sys.stderr)
                return file
            file.close()
            raise
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # the process that held it has removed it in between


def exists(path: str) -> bool:
    """Return whether there is something at a path; False for words that are too long to be one, or hold a NUL."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def same_path(one: str | Path, two: str | Path) -> bool:
    """Return whether two names mean the same file or folder, which need not exist."""
    return os.path.realpath(one) == os.path.realpath(two)


def hash_samples(digest: hashlib._Hash, path: Path) -> None:
    """Add a file's size, and up to 64 evenly spaced pages of 4 KiB, the first and the last included, to a digest."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        last = max(size - _SAMPLE_BYTES, 0)
        digest.update(f"{size}\n".encode())
        for offset in sorted({i * last // (_SAMPLES - 1) for i in range(_SAMPLES)}):
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))


def append_file(path: Path, target: BinaryIO) -> None:
    """Append a file's bytes to an open file, copied by the kernel."""
    target.flush()
    with path.open("rb") as source:
        while os.sendfile(target.fileno(), source.fileno(), None, 1 << 30):
            pass
    target.seek(0, os.SEEK_END)
