"""The folder `<output-prefix>.partial` of an unfinished preprocessing run, from which a killed run continues.

It holds the growing files, `run.state` (the settings and inputs) and `progress.state` (how much is done durably).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lfr.fileio import lock_file, write_atomic

_RUN, _PROGRESS, _LOCK = "run.state", "progress.state", "lock"


class Workspace:
    """The folder, locked by this process.

    settings, inputs: what the output depends on; a folder left by a run with others is refused. progress: what `save`
    was last given before a kill, or None for a run that has yet to start, by `begin`.

    Errors: ValueError, which says what to do, when the folder is damaged, was not made by preprocess, is of another
    run, or is locked by another process; OSError.
    """

    def __init__(self, prefix: Path, settings: dict[str, Any], inputs: list[Any], restart: bool) -> None:
        self.path = prefix.with_name(f"{prefix.name}.partial")
        self._check_ours()
        self.path.mkdir(exist_ok=True)
        self._lock()
        self._run = {"settings": settings, "inputs": inputs}
        self.progress = None if restart else self._load_progress(settings, inputs)

    def begin(self) -> None:
        """Discard what an earlier run has left, and write down the settings and inputs of this one."""
        (self.path / _PROGRESS).unlink(missing_ok=True)
        self._clear(keep=(_LOCK,))
        write_atomic(self.path / _RUN, json.dumps(self._run))

    @property
    def has_progress(self) -> bool:
        return (self.path / _PROGRESS).exists()

    def save(self, progress: dict[str, Any]) -> None:
        """Save how far the run is, atomically. What `progress` refers to must be on the disk."""
        write_atomic(self.path / _PROGRESS, json.dumps(progress))

    def remove(self) -> None:
        """Remove the folder: first its files, then what says that a run is nearly finished, and last what says that the
        folder was made by preprocess."""
        self._clear(keep=(_PROGRESS, _RUN, _LOCK))
        (self.path / _PROGRESS).unlink(missing_ok=True)
        (self.path / _RUN).unlink(missing_ok=True)
        (self.path / _LOCK).unlink()
        self.path.rmdir()
        self._release()

    def leave(self, error: BaseException) -> None:
        """Stop because of `error`: keep what is saved for the next run; where nothing is saved, remove the folder."""
        if self.has_progress:
            self._release()
            error.add_note(f"what is done so far is kept in {self.path}")
        else:
            self.remove()

    def _release(self) -> None:
        self._held.close()

    def _check_ours(self) -> None:
        if not self.path.exists() or (self.path / _RUN).exists():
            return
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else [self.path.name]
        if not all(name == _LOCK or name.startswith(f".{_RUN}.tmp-") for name in names):
            raise ValueError(
                f"{self.path}: is in the way and was not made by preprocess; move it, or choose another name"
            )

    def _lock(self) -> None:
        self._held = lock_file(self.path / _LOCK, f"{self.path}: another process is working on this output")

    def _load_progress(self, settings: dict[str, Any], inputs: list[Any]) -> dict[str, Any] | None:
        if not self.has_progress:
            return None
        try:
            run = json.loads((self.path / _RUN).read_text())
            progress = json.loads((self.path / _PROGRESS).read_text())
            differs = _difference(run["settings"], settings) or _input_difference(run["inputs"], inputs)
            if not isinstance(progress, dict):
                raise TypeError("no object")
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            self._release()
            raise damaged(self.path, error) from None
        if differs:
            self._release()
            raise ValueError(
                f"{self.path}: holds an unfinished run with other {differs}. Give what it was started with to finish "
                "it, or --restart to discard it"
            )
        return progress

    def _clear(self, keep: tuple[str, ...]) -> None:
        for path in self.path.iterdir():
            if path.name not in keep:
                path.unlink()


def damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: the unfinished run in it is damaged ({error!r}); discard it with --restart")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the first setting that differs; one that an older version did not save was None."""
    differences = (
        f"{key}: {before.get(key)} then, {value} now" for key, value in now.items() if before.get(key) != value
    )
    return next(differences, "")


def _input_difference(before: list[Any], now: list[Any]) -> str:
    if len(before) != len(now):
        return f"inputs: {len(before)} then, {len(now)} now"
    for then, entry in zip(before, now, strict=True):
        if then != entry:
            same = then[0] == entry[0]
            return f"inputs: {entry[0]} has changed since" if same else f"inputs: {then[0]} then, {entry[0]} now"
    return ""
