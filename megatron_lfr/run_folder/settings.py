"""The settings of a run: as YAML, where their paths lead, and what became of them from start to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_lfr.data.config import DataConfig, parse_blend

_OF_THE_COMMAND = ("save", "load", "print_config")
"""Settings that do not shape a run."""

Settings = Mapping[str, Any]
"""Values by the flags' names."""
Changes = dict[str, list[Any]]
"""[before, after] by the flags' names."""


@dataclass(frozen=True)
class History:
    """What a run was made with, the oldest first: the first entry holds all `settings` from step 0 on, each later one
    the `changed` ones ([before, after]) from its `step` on; `folder` is where the command was given."""

    entries: list[dict[str, Any]]

    @staticmethod
    def read(path: Path) -> History:
        """The history in a file; an empty one where there is none. ValueError for a file that is no history."""
        entries = read_yaml(path) if path.exists() else []
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise ValueError(f"{path}: expected a list of entries with step, folder, settings or changed")
        return History(entries)

    @property
    def started_in(self) -> Path | None:
        """The folder that the run was last started in; None where that is not recorded."""
        return Path(self.entries[-1]["folder"]) if self.entries else None

    def at(self, step: int) -> dict[str, Any]:
        """The settings with which the step after `step` was first trained; none where the history is empty."""
        settings: dict[str, Any] = {}
        for entry in self.entries:
            if entry["step"] <= step:
                settings.update(entry.get("settings", {}))
                settings.update({name: after for name, (_, after) in entry.get("changed", {}).items()})
        return settings

    def continued(self, settings: Settings, step: int, folder: Path, defaults: Settings) -> History:
        """This history with `settings` in force from `step` on, given in `folder`. Entries of later steps, which are
        trained anew, go. defaults: of settings that the version before did not have."""
        kept = [entry for entry in self.entries if entry["step"] <= step] if step else []
        if not kept:
            return History([{"step": step, "folder": str(folder), "settings": dict(settings)}])
        changed = differences({**defaults, **self.at(step)}, settings)
        if changed or kept[-1]["folder"] != str(folder):
            kept.append({"step": step, "folder": str(folder), "changed": changed})
        return History(kept)


def differences(before: Settings, after: Settings) -> Changes:
    """The settings of a run that differ, those of the command aside."""
    return {
        name: [before.get(name), value]
        for name, value in after.items()
        if before.get(name) != value and name not in _OF_THE_COMMAND
    }


def located(settings: Settings, start: Path) -> dict[str, Any]:
    """Settings whose relative paths were given from the folder `start`: they are looked for from there, then from the
    present one, and those that are there become absolute. OSError where --data-args-path is gone."""
    settings = dict(settings)
    for name in ("data_args_path", "tokenizer_model", "lfr_schedule"):
        if isinstance(settings.get(name), str) and settings[name] != "bytes":
            settings[name] = _locate(settings[name], start, ("",), keep=name == "lfr_schedule")
    words = settings.get("data_path") or []
    if settings.get("data_args_path"):
        prefixes, weights = DataConfig(data_args_path=settings.pop("data_args_path")).corpora()
    elif isinstance(words, list):
        prefixes, weights = parse_blend([str(word) for word in words], "--data-path")
    else:
        return settings
    prefixes = [_locate(prefix, start, (".idx", ".bin")) for prefix in prefixes]
    settings["data_path"] = prefixes
    if weights is not None:
        settings["data_path"] = [word for pair in zip(map(repr, weights), prefixes, strict=True) for word in pair]
    return settings


def parse_yaml(text: bytes | str) -> Any:
    """What YAML in UTF-8 holds, of plain values alone; ValueError says what is wrong with it."""
    try:
        return yaml.safe_load(text if isinstance(text, str) else text.decode())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; ValueError names the file."""
    try:
        return parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def dump_yaml(value: Any) -> str:
    """Plain values as YAML."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text


def _is_entry(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("folder"), str)):
        return False
    settings, changed = entry.get("settings", {}), entry.get("changed", {})
    if not (isinstance(settings, dict) and isinstance(changed, dict)):
        return False
    return all(isinstance(pair, list) and len(pair) == 2 for pair in changed.values())


def _locate(name: str, start: Path, suffixes: tuple[str, ...], keep: bool = False) -> str:
    """`name` where it lies: from `start`, or from the present folder. Where it is in neither: from `start`, or as it is
    (`keep`)."""
    for folder in (start, Path.cwd()):
        if any(Path(f"{folder / name}{suffix}").exists() for suffix in suffixes):
            return str(folder / name)
    return name if keep else str(start / name)
