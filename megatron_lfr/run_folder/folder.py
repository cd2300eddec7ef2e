"""The folder of a run, for writers and readers.

run.json               the format of the folder, and a branch's parent (lineage.py); older runs have none
config.yaml            the settings in force, as --config reads them
config_history.yaml    where the run was started, what it was started with, and what changed later, with the step
metrics.jsonl          losses, evaluations and phases, one JSON object a line (training/metrics.py)
journal/               the loss of every block at every visit, and what the run is (lfr/journal.py)
checkpoints/           weights, optimizer and the position in the curriculum (checkpoint/store.py)
tensorboard/           scalars
profile/               with --profile: a trace of each rank that records one
extension.json         only after a kill within an extension (replacing.py)
deepspeed_config.json  with --deepspeed: a copy of the file of --deepspeed-config
deepspeed.json         with --deepspeed: what DeepSpeed was given, of that file and of the settings
lock                   held by the process that trains
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.block_values import BlockValues, numbers
from megatron_lfr.fileio import lock_file, write_atomic
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.identity import read_arrays, read_plan
from megatron_lfr.lfr.journal import JournalReader, dump_identity, parse_identity
from megatron_lfr.run_folder.lineage import Parent, parse_parent
from megatron_lfr.run_folder.replacing import current_bytes, finish_replacing, replace_together
from megatron_lfr.run_folder.score_files import ScoreFiles
from megatron_lfr.run_folder.settings import (
    Changes,
    History,
    Settings,
    differences,
    dump_yaml,
    located,
    located_scores,
    parse_yaml_file,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from megatron_lfr.checkpoint import Checkpoint

FORMAT = 1
"""Version of the folder, in run.json. Runs from before it was recorded have this version."""
DEEPSPEED_COPY = "deepspeed_config.json"


class RunFolder:
    """One run on disk. Only `hold` and what begins with `write` change anything in it.

    flag: the flag that named the folder on the command line, for messages. The configuration and its history are read
    at their first use and kept; metrics and journal, which grow while a run trains, are read each time.
    """

    def __init__(self, path: str | Path, flag: str | None = None) -> None:
        self.path = Path(path)
        self._named = f"{flag} {path}" if flag else str(path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_folder(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard_folder(self) -> Path:
        return self.path / "tensorboard"

    @property
    def profile_folder(self) -> Path:
        return self.path / "profile"

    @property
    def _history_file(self) -> Path:
        return self.path / "config_history.yaml"

    @property
    def _description_file(self) -> Path:
        return self.path / "run.json"

    # Reading

    def check_format(self) -> None:
        """Raise ValueError where a later version of megatron_lfr has made the folder. All reading begins with this."""
        self._read_description()

    @property
    def parent(self) -> Parent | None:
        """Return the run that this one is a branch of, else None. ValueError where its description is damaged."""
        description = self._read_description()
        try:
            return parse_parent(description)
        except ValueError as error:
            raise ValueError(f"{self._description_file}: {error}") from None

    @cached_property
    def recorded_settings(self) -> dict[str, Any]:
        """Settings in force, as they were given, by the names of their flags. Raises ValueError where the folder holds
        no run, or the file is damaged."""
        if not self.config_file.is_file():
            raise ValueError(f"{self._named}: not a run folder, it has no config.yaml")
        self.check_format()
        settings = parse_yaml_file(self.config_file, current_bytes(self.path, self.config_file.name))
        if not isinstance(settings, dict):
            raise ValueError(f"{self.config_file}: expected a mapping of flags to values")
        return settings

    @cached_property
    def history(self) -> History:
        """Settings of the run from its start. Raises ValueError where the file is damaged."""
        self.check_format()
        if not self._history_file.exists():
            return History([])
        return History.parse(self._history_file, current_bytes(self.path, self._history_file.name))

    def settings(self) -> dict[str, Any]:
        """Return the settings in force, with the paths of the corpus, the tokenizer and the schedule resolved (see
        `located`). Raises ValueError as `recorded_settings` and `history` do, and OSError where --data-args-path is
        gone."""
        start = self.history.started_in
        return self.recorded_settings if start is None else located(self.recorded_settings, start)

    def settings_at(self, step: int) -> dict[str, Any]:
        """Return the settings with which the step after `step` was first trained; without a history, those in force."""
        return self.history.at(step) or self.recorded_settings

    def changes(self, settings: Settings, step: int, defaults: Settings) -> Changes:
        """Return the settings ([before, after]) that differ from those of the run at `step`. defaults: values of the
        settings that an earlier version, which trained that step, did not have."""
        return differences({**defaults, **self.settings_at(step)}, settings)

    @property
    def journal(self) -> JournalReader:
        """Reader of the losses of all samples so far."""
        return JournalReader(self.path / "journal")

    def identity(self) -> dict[str, Any]:
        """Read the run's facts from its journal. Raises ValueError where there is no journal, or a damaged one."""
        self.check_format()
        meta = self.journal.meta_file
        if not meta.exists():
            return self.journal.read_identity()  # ValueError
        return parse_identity(meta, current_bytes(self.path, str(meta.relative_to(self.path))))

    def plan(self) -> tuple[Plan, int]:
        """Return (plan, seed), from which the run's orders are made; errors as for `identity`."""
        identity = self.identity()
        try:
            return read_plan(identity)
        except ValueError as error:
            raise ValueError(f"{self.journal.folder}/meta.json: {error}") from None

    def arrays(self, segments: int | None = None) -> list[dict[str, npt.NDArray[np.number]]]:
        """Map the arrays of --lfr-scores that the phases of each segment use; errors as for `score_files`."""
        return numbers(self.score_files(segments))

    def score_files(self, segments: int | None = None, given: Sequence[str] = ()) -> list[dict[str, BlockValues]]:
        """Map the files of --lfr-scores that the phases of each of the first `segments` segments use, by default of
        all: of the files that a name has had, and those `given` now, the one that the segment was begun with.
        ValueError or OSError where it is missing, or has changed."""
        identity = self.identity()
        try:
            digests = read_arrays(identity)[:segments]
        except ValueError as error:
            raise ValueError(f"{self.journal.folder}/meta.json: {error}") from None
        if not any(digests):
            return [{} for _ in digests]
        known = ScoreFiles(self.path, [*self.history.score_words(), *(self.settings().get("lfr_scores") or []), *given])
        return [{name: known.find(name, digest) for name, digest in named.items()} for named in digests]

    def events(self, length: int | None = None) -> list[dict[str, Any]]:
        """Read the complete lines of metrics.jsonl, or of its first `length` bytes; none where there is no such file.

        Raises ValueError that names a line that is not an event, or a file whose first `length` bytes are not complete
        lines.
        """
        path = self.metrics_file
        text = path.read_bytes() if path.exists() else b""
        if length is not None and len(text) < length:
            raise ValueError(f"{path}: holds {len(text)} bytes, the checkpoint needs {length}")
        lines = text[:length].split(b"\n")
        events = [_parse_event(path, number, line) for number, line in enumerate(lines[:-1], 1)]
        if length is not None and lines[-1]:
            raise ValueError(f"{path}: no line ends after {length} bytes, where the checkpoint was written")
        return events  # after the last newline there may be a part of a line, which is being written

    def find_checkpoint(self, group: ProcessGroup | None = None) -> Checkpoint | None:
        """Open the newest complete checkpoint; None where there is no checkpoint at all. Collective over `group`;
        errors as from `CheckpointStore.newest_complete`."""
        from megatron_lfr.checkpoint import CheckpointStore  # it imports PyTorch, which other readers do not need

        return CheckpointStore(self.checkpoint_folder, keep=None, group=group).newest_complete()

    def checkpoint(self, iteration: int | None = None, group: ProcessGroup | None = None) -> Checkpoint:
        """Open the checkpoint of an iteration, by default the newest complete one. Collective over `group`. Raises
        ValueError where it is missing or damaged."""
        from megatron_lfr.checkpoint import CheckpointStore

        if iteration is not None:
            return CheckpointStore(self.checkpoint_folder, keep=None, group=group).checkpoint(iteration)
        newest = self.find_checkpoint(group)
        if newest is None:
            raise ValueError(f"{self._named}: holds no checkpoint")
        return newest

    def _read_description(self) -> dict[str, Any]:
        if not self._description_file.exists():
            return {"format": FORMAT}
        try:
            description = json.loads(self._description_file.read_bytes())
            version = description["format"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{self._description_file}: not the description of a run ({error!r})") from None
        if version != FORMAT:
            raise ValueError(
                f"{self._description_file}: format {version!r}: this version of megatron_lfr reads format {FORMAT}"
            )
        return dict(description)

    # Writing

    def write_branch(self, parent: Parent, settings: Settings, history: History) -> None:
        """Make the folder that of a branch: its parent, the `settings` in force, and what they were before."""
        facts = {name: value for name, value in dataclasses.asdict(parent).items() if value is not None}
        description = {"format": FORMAT, "parent": facts}
        write_atomic(self._description_file, json.dumps(description, indent=1) + "\n")
        self._write_history(history)
        self.write_config(settings)

    def write_config(self, settings: Settings) -> None:
        """Write `settings` as those in force; the folder is a run's from then on."""
        if not self._description_file.exists():
            write_atomic(self._description_file, json.dumps({"format": FORMAT}) + "\n")
        write_atomic(self.config_file, dump_yaml(dict(settings)))
        self.recorded_settings = dict(settings)

    def write_deepspeed(self, settings: Settings, source: Path) -> None:
        """Note what DeepSpeed is given, and keep a copy of the file that says so."""
        write_atomic(self.path / DEEPSPEED_COPY, source.read_text("utf-8"))
        write_atomic(self.path / "deepspeed.json", json.dumps(settings, indent=1) + "\n")

    def write_settings(
        self, settings: Settings, step: int, defaults: Settings, segments: int, start: Path | None = None
    ) -> None:
        """Put `settings` in force from `step` on, and record the change. Entries of later steps, which will be trained
        again, are dropped from the history. defaults: as for `changes`. segments: the number of the plan's segments.
        start: the folder that paths in the settings lead from; None: the present one."""
        history = self.history.continued(settings, step, start or Path.cwd(), defaults, segments)
        self._write_history(history)
        self.write_config(settings)

    def move_scores(self, words: Sequence[str], step: int, defaults: Settings, segments: int) -> bool:
        """Record where the files of --lfr-scores are now, and whether that is news; all else stays as it is. words:
        those of the present command. The other arguments are as for `write_settings`."""
        start = self.history.started_in or Path.cwd()
        named = (str(word).partition("=") for word in self.recorded_settings.get("lfr_scores") or [])
        now = located_scores(words, Path.cwd())
        if now == [f"{name}={start / path}" for name, _, path in named]:
            return False
        self.write_settings({**self.recorded_settings, "lfr_scores": now}, step, defaults, segments, start)
        return True

    def _write_history(self, history: History) -> None:
        write_atomic(self._history_file, dump_yaml(history.entries))
        self.history = history

    def write_extension(self, facts: Mapping[str, Any], settings: Settings, history: History) -> None:
        """Give the run more segments: its `facts`, the `settings` in force and what they were before. A kill at any
        moment leaves the run as it was, or as it is to be. For the process that holds the folder."""
        texts = {
            self.config_file.name: dump_yaml(dict(settings)),
            self._history_file.name: dump_yaml(history.entries),
            str(self.journal.meta_file.relative_to(self.path)): dump_identity(facts),
        }
        replace_together(self.path, texts)
        self.recorded_settings, self.history = dict(settings), history

    def check_writable(self, tensorboard: Path) -> None:
        """Check that a run can write here, and into `tensorboard`; ValueError or OSError names what is in the way."""
        files = (self._description_file, self.config_file, self._history_file, self.metrics_file)
        folders = (self.checkpoint_folder, self.journal.folder, tensorboard)
        for path in (*files, *folders):
            if path.exists() and path.is_dir() != (path in folders):
                raise ValueError(f"{path}: is {'no folder' if path in folders else 'a folder'}; remove it")
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def check_is_free(self) -> None:
        """Check that a new run would replace no files, except those of a run that trained no step; ValueError names the
        file."""
        if self._history_file.exists():
            return
        for path in (self.config_file, self.metrics_file):
            if path.exists() and path.stat().st_size:
                raise ValueError(f"{self._named}: {path.name} there is no run's; move it, or name another folder")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other processes out of the folder, which is made if it is missing. If an error comes before anything new
        was written, the folder is left as it was before.

        Raises ValueError where another process is training in it, or it is not a folder.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):  # a file, or a link to nothing
            raise ValueError(f"{self._named}: not a folder") from None
        lock, before = self.path / "lock", set(self.path.iterdir())
        with lock_file(lock, f"{self._named}: another process is training in this folder"):
            try:
                self.check_format()
                finish_replacing(self.path)
                yield
            except BaseException:
                if set(self.path.iterdir()) - before == {lock}:
                    lock.unlink()
                    for folder in made:
                        folder.rmdir()
                raise


def _parse_event(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(event, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object")
    return event
