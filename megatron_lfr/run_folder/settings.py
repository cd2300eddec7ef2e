"""The settings of a run: as YAML, with paths resolved, and with their changes from start to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_lfr.data.config import DataConfig, parse_blend, vocabulary_and_merges
from megatron_lfr.fileio import exists

_OF_THE_COMMAND = ("save", "load", "lora_load", "print_config", "override_opt_param_scheduler")
"""Settings that concern a command only, not the run."""

OF_SEGMENT = (
    *("data_path", "data_args_path", "lfr_schedule", "lfr_scores", "lfr_focus_scope", "replay"),
    *("global_batch_size", "train_iters", "train_samples", "train_epochs"),
)
"""Settings that describe the last segment of a run's plan."""

Settings = Mapping[str, Any]
"""Values of settings, by the names of their flags."""
Changes = dict[str, list[Any]]
"""[value before, value after] of settings, by the names of their flags."""


@dataclass(frozen=True)
class History:
    """The settings that a run was trained with, oldest entry first. The first entry holds all `settings` from step 0
    on, each later one those `changed` ([before, after]) from its `step` on; `folder` is where the command was
    started. `segments`: the number of segments of the run's plan, the last of which the settings describe; 1 where it
    is not given."""

    entries: list[dict[str, Any]]

    @staticmethod
    def parse(path: Path, content: bytes) -> History:
        """Parse the content of the history file `path`. ValueError where it is not a history."""
        entries = parse_yaml_file(path, content)
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise ValueError(f"{path}: expected a list of entries with step, folder, settings or changed")
        return History(entries)

    @property
    def started_in(self) -> Path | None:
        """Folder that the run was last started in; None where it is not recorded."""
        return Path(self.entries[-1]["folder"]) if self.entries else None

    def at(self, step: int) -> dict[str, Any]:
        """Return the settings with which the step after `step` was first trained; none where the history is empty."""
        settings: dict[str, Any] = {}
        for entry in self.until(step).entries:
            settings.update(entry.get("settings", {}))
            settings.update({name: after for name, (_, after) in entry.get("changed", {}).items()})
        return settings

    def segments_at(self, step: int) -> int:
        """Return how many segments the run's plan had when the step after `step` was first trained."""
        known = [entry.get("segments", 1) for entry in self.until(step).entries]
        return int(known[-1]) if known else 1

    def score_words(self) -> list[str]:
        """Return all words of --lfr-scores that were given, the newest last, with the paths of their files resolved."""
        words: list[str] = []
        given: Any = []
        for entry in self.entries:
            given = entry.get("settings", {}).get("lfr_scores", given)
            given = entry.get("changed", {}).get("lfr_scores", (None, given))[1]
            words += located_scores(given, Path(entry["folder"]))
        return words

    def until(self, step: int) -> History:
        """Return the entries that were made up to `step`."""
        return History([entry for entry in self.entries if entry["step"] <= step])

    def of_segments(self, segments: int) -> History:
        """Return the entries from before the run's plan had more than `segments` segments."""
        return History([entry for entry in self.entries if entry.get("segments", 1) <= segments])

    def continued(self, settings: Settings, step: int, folder: Path, defaults: Settings, segments: int = 1) -> History:
        """Return this history with `settings` in force from `step` on, where `folder` is the present one. Entries of
        later steps, which will be trained again, are dropped. defaults: values of the settings that an earlier version
        did not have. segments: the number of segments of the plan."""
        of_plan = {"segments": segments} if segments > 1 else {}
        kept = self.until(step).entries if step else []
        if not kept:
            return History([{"step": step, "folder": str(folder), "settings": dict(settings), **of_plan}])
        changed = differences({**defaults, **self.at(step)}, settings)
        if changed or kept[-1]["folder"] != str(folder) or kept[-1].get("segments", 1) != segments:
            kept.append({"step": step, "folder": str(folder), "changed": changed, **of_plan})
        return History(kept)


def differences(before: Settings, after: Settings) -> Changes:
    """Return the settings of a run that differ, without those that concern a command only."""
    return {
        name: [before.get(name), value]
        for name, value in after.items()
        if before.get(name) != value and name not in _OF_THE_COMMAND
    }


def located(settings: Settings, start: Path) -> dict[str, Any]:
    """Resolve the paths in settings that were given in the folder `start`. Relative ones are looked for from there,
    then from the present folder; those of files that exist become absolute. OSError where --data-args-path is gone."""
    settings = dict(settings)
    for name in ("data_args_path", "tokenizer_model", "lfr_schedule"):
        if isinstance(settings.get(name), str) and settings[name] != "bytes":
            files = (name == "tokenizer_model" and vocabulary_and_merges(settings[name])) or (settings[name],)
            settings[name] = ",".join(_locate(file, start, ("",), keep=name == "lfr_schedule") for file in files)
    if isinstance(settings.get("lfr_scores"), list):
        settings["lfr_scores"] = located_scores(settings["lfr_scores"], start)
    if settings.get("lora_rank") is not None and isinstance(settings.get("load"), str):  # the base, needed ever after
        settings["load"] = _locate(settings["load"], start, ("",))
    if isinstance(settings.get("valid_data_path"), list):
        settings["valid_data_path"] = [_located_prefix(str(prefix), start) for prefix in settings["valid_data_path"]]
    words = settings.get("data_path") or []
    if settings.get("data_args_path"):
        prefixes, weights = DataConfig(data_args_path=settings.pop("data_args_path")).corpora()
    elif isinstance(words, list):
        prefixes, weights = parse_blend([str(word) for word in words], "--data-path")
    else:
        return settings
    prefixes = [_located_prefix(prefix, start) for prefix in prefixes]
    settings["data_path"] = prefixes
    if weights is not None:
        settings["data_path"] = [word for pair in zip(map(repr, weights), prefixes, strict=True) for word in pair]
    return settings


def _located_prefix(prefix: str, start: Path) -> str:
    return _locate(prefix, start, (".idx", ".bin"))


def located_scores(words: Any, start: Path) -> list[str]:
    """Resolve the paths in words of --lfr-scores as `located` does."""
    named = (str(word).partition("=") for word in (words if isinstance(words, list) else []))
    return [f"{name}={_locate(path, start, ('',))}" for name, _, path in named]


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which the last would count."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} is there twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return node


def parse_yaml(text: bytes | str) -> Any:
    """Parse YAML in UTF-8 that holds only plain values, no key twice; ValueError says what is wrong with it."""
    try:
        return yaml.load(text if isinstance(text, str) else text.decode(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None


def parse_yaml_file(path: Path, content: bytes) -> Any:
    """Parse the content of a YAML file; ValueError names the file."""
    try:
        return parse_yaml(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def dump_yaml(value: Any) -> str:
    """Return plain values as YAML."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text


def _is_entry(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("folder"), str)):
        return False
    settings, changed = entry.get("settings", {}), entry.get("changed", {})
    segments = entry.get("segments", 1)
    if not (isinstance(settings, dict) and isinstance(changed, dict) and isinstance(segments, int)):
        return False
    return all(isinstance(pair, list) and len(pair) == 2 for pair in changed.values())


def _locate(name: str, start: Path, suffixes: tuple[str, ...], keep: bool = False) -> str:
    """Look for `name` from `start`, then from the present folder. If it is in neither, return the path from `start`, or
    with `keep`, the name unchanged."""
    for folder in (start, Path.cwd()):
        if any(exists(f"{folder / name}{suffix}") for suffix in suffixes):
            return str(folder / name)
    return name if keep else str(start / name)
