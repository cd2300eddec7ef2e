"""One run on disk: its lock, and its settings with their history.

config.yaml            the settings in force, as --config reads them
config_history.yaml    where the run was started, what it was started with, and what changed later, with the step
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_lfr.data.config import DataConfig, parse_blend
from megatron_lfr.fileio import lock_file, write_atomic

_OF_THE_COMMAND = ("save", "load", "print_config")
"""Settings that do not shape a run."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run. Only `hold` and `write_settings` change anything in it."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def _history(self) -> Path:
        return self.path / "config_history.yaml"

    def settings(self) -> dict[str, Any]:
        """The settings in force, by the flags' names. Relative paths were given from the folder that the run was last
        started in, and are looked for from there, then from the present one; those found become absolute.

        ValueError where the folder holds no run, or its files are damaged; OSError where --data-args-path is gone.
        """
        settings = self.recorded_settings()
        start = self.started_in()
        if start is None:
            return settings
        for name in ("data_args_path", "tokenizer_model", "lfr_schedule"):
            if isinstance(settings.get(name), str) and settings[name] != "bytes":
                settings[name] = _located(settings[name], start, ("",), keep=name == "lfr_schedule")
        words = settings.get("data_path") or []
        if settings.get("data_args_path"):
            data = DataConfig(data_args_path=settings.pop("data_args_path"))
            prefixes, weights = data.corpora()
        elif isinstance(words, list):
            prefixes, weights = parse_blend([str(word) for word in words], "--data-path")
        else:
            return settings
        found = [_located(prefix, start, (".idx", ".bin")) for prefix in prefixes]
        settings["data_path"] = (
            found
            if weights is None
            else [word for pair in zip(map(repr, weights), found, strict=True) for word in pair]
        )
        return settings

    def recorded_settings(self) -> dict[str, Any]:
        """The settings in force as they were given."""
        if not self.config.is_file():
            raise ValueError(f"{self.path}: not a run folder, it has no config.yaml")
        found = _read_yaml(self.config)
        if not isinstance(found, dict):
            raise ValueError(f"{self.config}: expected a mapping of flags to values")
        return found

    def started_in(self) -> Path | None:
        """The folder that the run was last started in; None where that is not recorded."""
        history = self.history()
        return Path(history[-1]["folder"]) if history else None

    def history(self) -> list[dict[str, Any]]:
        """What the run was made with, the oldest first: the first entry holds all `settings` from step 0 on, each later
        one the `changed` ones ([before, after]) from its `step` on; `folder` is where the command was given."""
        if not self._history.exists():
            return []
        entries = _read_yaml(self._history)
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise ValueError(f"{self._history}: expected a list of entries with step, folder, settings or changed")
        return entries

    def settings_at(self, step: int) -> dict[str, Any]:
        """The settings with which the step after `step` was first trained; those in force where no history says."""
        settings: dict[str, Any] = {}
        for entry in self.history():
            if entry["step"] <= step:
                settings.update(entry.get("settings", {}))
                settings.update({name: after for name, (_, after) in entry.get("changed", {}).items()})
        return settings or self.recorded_settings()

    def changes(self, settings: Mapping[str, Any], step: int) -> dict[str, list[Any]]:
        """The settings ([before, after]) that differ from those of the run at `step`."""
        before = self.settings_at(step)
        return {
            name: [before.get(name), value]
            for name, value in settings.items()
            if before.get(name) != value and name not in _OF_THE_COMMAND
        }

    def write_settings(self, settings: Mapping[str, Any], step: int) -> None:
        """Put `settings` in force from `step` on. Entries of later steps, which are trained anew, go."""
        here = str(Path.cwd())
        kept = [entry for entry in self.history() if entry["step"] <= step] if step else []
        if not kept:
            kept = [{"step": step, "folder": here, "settings": dict(settings)}]
        elif (changed := self.changes(settings, step)) or kept[-1]["folder"] != here:
            kept.append({"step": step, "folder": here, "changed": changed})
        write_atomic(self._history, _dump(kept))
        write_atomic(self.config, _dump(dict(settings)))

    def check_places(self, tensorboard: Path) -> None:
        """Check that a run can write here, and into `tensorboard`; ValueError or OSError names what is in the way."""
        files, folders = (self.config, self._history, self.metrics), (self.checkpoints, self.journal, tensorboard)
        for path in (*files, *folders):
            if path.exists() and path.is_dir() != (path in folders):
                raise ValueError(f"{path}: is {'no folder' if path in folders else 'a folder'}; remove it")
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def check_is_free(self) -> None:
        """Check that a new run replaces no files but those of one that trained nothing; ValueError names another."""
        if self._history.exists():
            return
        for path in (self.config, self.metrics):
            if path.exists() and path.stat().st_size:
                raise ValueError(f"--save {self.path}: {path.name} there is no run's; move it, or name another folder")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other processes out of the folder, which is made if it is missing. Where an error comes before anything
        new was put into it, it is afterwards as it was before.

        ValueError where another process is training in it, or it is no folder.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):  # a file, or a link to nothing
            raise ValueError(f"--save {self.path}: something else than a folder stands there") from None
        lock, there = self.path / "lock", set(self.path.iterdir())
        try:
            held = lock_file(lock)
        except BlockingIOError:
            raise ValueError(f"--save {self.path}: another process is training in this folder") from None
        with held:
            try:
                yield
            except BaseException:
                if set(self.path.iterdir()) - there == {lock}:
                    lock.unlink()
                    for folder in made:
                        folder.rmdir()
                raise


def _is_entry(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("folder"), str)):
        return False
    settings, changed = entry.get("settings", {}), entry.get("changed", {})
    if not (isinstance(settings, dict) and isinstance(changed, dict)):
        return False
    return all(isinstance(pair, list) and len(pair) == 2 for pair in changed.values())


def _located(name: str, start: Path, suffixes: tuple[str, ...], keep: bool = False) -> str:
    """`name` where it lies: from `start`, or from the present folder. Where it is in neither: from `start`, or as it is
    (`keep`)."""
    for folder in (start, Path.cwd()):
        if any(Path(f"{folder / name}{suffix}").exists() for suffix in suffixes):
            return str(folder / name)
    return name if keep else str(start / name)


def parse_yaml(text: bytes | str) -> Any:
    """What YAML in UTF-8 holds, of plain values alone; ValueError says what is wrong with it."""
    try:
        return yaml.safe_load(text if isinstance(text, str) else text.decode())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path) -> Any:
    try:
        return parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _dump(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text
