"""The journal keeps the loss of every sample on disk, in the order of training.

    journal/meta.json          facts of the run: corpus fingerprint, schedule, seed, ...
    journal/phase_000.npy      fp32 [samples so far], mean NLL of each sample of the phase; UNRECORDED (-1) for the
                               samples of a skipped step. The phase's order says which block a sample was.
    journal/phase_003.scores.npy   fp32 [n_blocks], only where the phase's scores came from a rescoring pass
                               or a function of the user's.

Phase files are append-only: a checkpoint stores their length, and resuming cuts them back to it.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_lfr.fileio import fsync_directory, write_atomic

UNRECORDED = np.float32(-1.0)
"""Journal entry of a sample whose loss does not count, since its step was skipped or all of its tokens were masked. A
real negative log-likelihood is never negative."""

_HEADER_BYTES = 128
_MAGIC_BYTES = len("\x93NUMPY....{'descr': '<f4',")


class JournalFiles:
    """The paths of a journal's files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def meta_file(self) -> Path:
        return self.folder / "meta.json"

    def path(self, phase: int) -> Path:
        return self.folder / f"phase_{phase:03d}.npy"

    def scores_path(self, phase: int) -> Path:
        return self.folder / f"phase_{phase:03d}.scores.npy"

    def partial_scores_path(self, phase: int) -> Path:
        return self.folder / f"phase_{phase:03d}.scores.partial"

    def phase_files(self) -> dict[Path, int]:
        """Return the files of all phases, each with its phase."""
        matches = ((path, re.match(r"phase_(\d{3,})\.", path.name)) for path in self.folder.glob("phase_*"))
        return {path: int(match[1]) for path, match in matches if match}

    def count_entries(self, phase: int | None = None) -> int:
        """Return how many entries of a phase, or of all phases, are on disk."""
        paths = self.phase_files() if phase is None else [self.path(phase)]
        sizes = [path.stat().st_size for path in paths if path.suffixes == [".npy"] and path.exists()]
        return sum(max(0, size - _HEADER_BYTES) // 4 for size in sizes)

    def check_holds(self, phase: int, count: int) -> None:
        """Raise a ValueError where the journal ends before entry `count` of `phase`; phase -1 is before the first."""
        available = self.count_entries(phase) if phase >= 0 else 0
        if available < count:
            raise ValueError(f"{self.path(phase)}: holds {available} entries, but the checkpoint needs {count}")

    def clear(self) -> None:
        """Delete the journal."""
        for path in (*self.phase_files(), self.meta_file):
            path.unlink(missing_ok=True)


class JournalReader(JournalFiles):
    """Reads a journal, whether its run has ended, was killed, or is still writing to it."""

    def read_identity(self) -> dict[str, Any]:
        """Return the facts in meta.json. ValueError where there is no journal, or meta.json is damaged."""
        return _read_identity(self.meta_file)

    def read(self, phase: int) -> npt.NDArray[np.float32] | None:
        """Return the complete entries of a phase so far, fp32 [entries]; None where the phase has not begun.

        Their number follows from the file's length: its header lags behind while a run writes, and after a kill.
        """
        path = self.path(phase)
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER_BYTES)
                rest = (os.fstat(file.fileno()).st_size - _HEADER_BYTES) // 4
                entries = np.fromfile(file, "<f4", max(0, rest)).astype(np.float32, copy=False)
        except FileNotFoundError:
            return None
        if len(header) < _HEADER_BYTES:  # just created
            return np.empty(0, np.float32)
        if not header.startswith(_header(0)[:_MAGIC_BYTES]):
            raise ValueError(f"{path}: not a phase of a journal")
        if not (np.isfinite(entries) & ((entries >= 0) | (entries == UNRECORDED))).all():
            raise ValueError(f"{path}: holds a value that is not a loss; the file is damaged")
        return entries


class Journal(JournalFiles):
    """Append-only record of a run's losses in `folder`, which it creates.

    identity: JSON-able facts on which the meaning of the losses depends. A folder that holds a journal with other facts
    is refused with a ValueError that names the first difference.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        super().__init__(folder)
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._file: BinaryIO | None = None
        self._phase = -1
        self._count = 0
        meta = self.meta_file
        if meta.exists():
            _check_identity(meta, self.identity)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(meta, dump_identity(self.identity))

    @property
    def phase(self) -> int:
        """Index of the phase that is being written; -1 before the first."""
        return self._phase

    @property
    def count(self) -> int:
        """Number of entries of the current phase."""
        return self._count

    def begin_phase(self, phase: int) -> None:
        """Create the file of the next phase."""
        if phase != self._phase + 1:
            raise ValueError(f"journal: phase {phase} cannot follow phase {self._phase}")
        self.sync()
        self._open(phase, 0, "w+b")
        fsync_directory(self.folder)

    def append(self, nll: npt.NDArray[np.float32]) -> None:
        """Append fp32 losses [n], in the order of training. They survive a kill of the process, but not a power cut."""
        assert self._file is not None
        self._file.write(np.ascontiguousarray(nll, np.float32).tobytes())
        self._file.flush()
        self._count += len(nll)

    def sync(self) -> None:
        """Bring everything appended so far to the disk, and the header up to date (fsync)."""
        if self._file is None:
            return
        self._file.flush()
        os.pwrite(self._file.fileno(), _header(self._count), 0)
        os.fsync(self._file.fileno())

    def reader(self) -> JournalReader:
        """Return a reader of the same files."""
        return JournalReader(self.folder)

    def read(self, phase: int) -> npt.NDArray[np.float32]:
        """Return the entries of a phase so far, fp32 [entries]."""
        if phase == self._phase:
            self.sync()
        entries: npt.NDArray[np.float32] = np.load(self.path(phase), allow_pickle=False)
        return entries

    def rewind(self, phase: int, count: int) -> None:
        """Cut the journal back to the first `count` entries of `phase` (-1: to nothing) and delete later phases.

        The rescored scores of the next phase are kept, since `phase` may be complete; where it is not, the caller
        deletes them with `drop_scores`.
        """
        self.close()
        self.check_holds(phase, count)
        for path, number in self.phase_files().items():
            if number > phase + 1 or (number == phase + 1 and path == self.path(number)):
                path.unlink()
        if phase >= 0:
            self._open(phase, count, "r+b")
            assert self._file is not None
            self._file.truncate(_HEADER_BYTES + 4 * count)
            self._file.seek(0, os.SEEK_END)
            self.sync()
        else:
            self._phase = -1
        fsync_directory(self.folder)

    def drop_scores(self, phase: int) -> None:
        """Delete the scores of a phase's rescoring, complete or not."""
        self.scores_path(phase).unlink(missing_ok=True)
        self.partial_scores_path(phase).unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _open(self, phase: int, count: int, mode: str) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self.path(phase).open(mode)  # type: ignore[assignment]
        assert self._file is not None
        self._phase, self._count = phase, count
        if mode == "w+b":
            self._file.write(_header(0))
            self.sync()


def _header(count: int) -> bytes:
    """Return a .npy header of fixed length for fp32 [count], so that it can be rewritten in place."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    header = buffer.getvalue()
    assert len(header) == _HEADER_BYTES
    return header


def _read_identity(meta: Path) -> dict[str, Any]:
    try:
        content = meta.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{meta.parent}: there is no journal of a run here") from None
    return parse_identity(meta, content)


def dump_identity(identity: Mapping[str, Any]) -> str:
    """Return facts as the text of meta.json."""
    return json.dumps(dict(identity), indent=1) + "\n"


def parse_identity(meta: Path, content: bytes) -> dict[str, Any]:
    """Parse the content of the file `meta` as facts; ValueError names it where they are none."""
    try:
        stored = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{meta}: not readable as JSON ({error})") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{meta}: expected a JSON object")
    return stored


def _check_identity(meta: Path, identity: Mapping[str, Any]) -> None:
    stored = _read_identity(meta)
    for key in [*identity, *sorted(set(stored) - set(identity))]:
        if stored.get(key) != identity.get(key):
            raise ValueError(
                f"{meta.parent}: this journal belongs to another run: its {key} is {_brief(stored.get(key))}, here "
                f"it is {_brief(identity.get(key))}. Restore it, or write to another folder (--save)."
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
