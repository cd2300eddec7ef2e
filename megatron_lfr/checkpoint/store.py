"""The checkpoints of a run, written so that a kill at any moment leaves the last complete one in force.

    checkpoints/iter_0000100/        shard-*.safetensors (torch.distributed.checkpoint), state.json, manifest.json
    checkpoints/latest_checkpointed_iteration.txt

A folder is written under a temporary name that begins with `.tmp-`, every file is fsynced, the folder is renamed, and
only then recorded as the latest. Reading changes nothing, so that others may read the folder while the run trains; the
next save removes what a kill has left behind.

An asynchronous store does the same in a thread on every rank, with a copy of the tensors in host memory. Each rank
hashes what it has written, so the manifest, and with it the checkpoint, waits for the last rank.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lfr.checkpoint.hosts import bring_checkpoint, collect_files
from megatron_lfr.checkpoint.manifest import FileRecord, find_damage, record_file, tensors_digest, write_manifest
from megatron_lfr.checkpoint.state import STATE_FILE, dump_state, read_state
from megatron_lfr.checkpoint.tensors import check_tensors, prepare_tensors, read_tensors, write_tensors
from megatron_lfr.fileio import describe, fsync_directory, write_atomic
from megatron_lfr.parallel import ranks

logger = logging.getLogger(__name__)

_LATEST = "latest_checkpointed_iteration.txt"
_ASIDE = ".tmp-"
_REPLACED = _ASIDE + "replaced-"

WriteTensors = Callable[[Path], list[str]]
"""A function that writes tensors into a folder as safetensors files and returns the files' names."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its iteration, its JSON state, and its tensors on disk."""

    iteration: int
    folder: Path
    state: dict[str, Any]
    group: ProcessGroup | None
    """The ranks that load it together."""

    @property
    def digest(self) -> str:
        """A digest of its tensors' files."""
        return tensors_digest(self.folder, STATE_FILE)

    def load_into(self, tensors: Mapping[str, Tensor], *, allow_extra: bool = False, rounds: bool = False) -> None:
        """Overwrite `tensors` in place with those of the same names. Collective.

        Raises ValueError that names the first tensor that is missing on either side, or differs in shape or type.
        `allow_extra`: the checkpoint may hold tensors that are not in `tensors`. `rounds`: those that are bf16 may be
        fp32 in the checkpoint.
        """
        read_tensors(self.folder, tensors, allow_extra=allow_extra, rounds=rounds, group=self.group)


class CheckpointStore:
    """The checkpoints in `root`, of which the newest `keep` are kept (None: all), and those of iterations that
    `retains` is true for.

    Every rank makes the same calls. `root` is best on a file system that all of them see; where hosts do not share one,
    rank 0's has the checkpoints, and hosts get copies of those that are loaded. Only one run may write there at a time.
    `group`: all ranks, over a backend that carries objects (None: the default group). `asynchronous`: `save` returns as
    soon as the tensors are copied, and `wait` when they are on the disk; `timeout` is how long the ranks then wait for
    each other (None: PyTorch's default).
    """

    def __init__(
        self,
        root: Path,
        keep: int | None,
        group: ProcessGroup | None = None,
        asynchronous: bool = False,
        timeout: timedelta | None = None,
        retains: Callable[[int], bool] = lambda iteration: False,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint is kept, or None for all")
        self.root = root
        self.keep = keep
        self.retains = retains
        self.group = group
        self.asynchronous = asynchronous
        # The thread's collectives must not meet those that training runs on `group` in the meantime.
        self._writing_group = group
        if asynchronous and dist.is_initialized():
            self._writing_group = dist.new_group(backend="gloo", timeout=timeout)
        self._in_flight: _Background | None = None

    def save(self, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest. Collective; returns its folder.

        A tensor that differs between ranks must be a DTensor, or have another name on each rank. `state` is taken from
        rank 0. Raises ValueError that names what JSON cannot hold in it, and OSError where the checkpoint cannot be
        written; earlier checkpoints are then untouched. An asynchronous store first waits for the previous save, and
        raises its error; `tensors` and `state` may be changed as soon as this returns.
        """
        self.wait()
        with ranks.failing_together(self.group):
            text = _checked(iteration, tensors, state)
            prepared = prepare_tensors(tensors, copied=self.asynchronous)

        def write(folder: Path) -> list[str]:
            return write_tensors(folder, prepared, self._writing_group)

        if self.asynchronous:
            self._in_flight = _Background(target=self._write, args=(iteration, write, text))
            self._in_flight.start()
        else:
            self._write(iteration, write, text)
        return self.root / _folder_name(iteration)

    def save_files(self, iteration: int, write: WriteTensors, state: Mapping[str, Any]) -> Path:
        """Save a checkpoint whose tensors `write` puts into the folder it is given: for tensors that are not in memory
        all at once. Otherwise as a synchronous `save`."""
        self._write(iteration, write, _checked(iteration, {}, state))
        return self.root / _folder_name(iteration)

    def wait(self) -> None:
        """Wait until no save is in flight. Raises the last one's error, once, on every rank."""
        if self._in_flight is None:
            return
        self._in_flight.join()
        failure, self._in_flight = self._in_flight.failure, None
        if failure is not None:
            raise failure

    def _write(self, iteration: int, write: WriteTensors, text: str) -> None:
        """Write what `save` has prepared. Collective over `_writing_group`."""
        group = self._writing_group
        final = self.root / _folder_name(iteration)
        aside, note = self.root / (_ASIDE + final.name), self.root / (_ASIDE + _LATEST)
        try:
            with ranks.failing_together(group):
                if ranks.rank(group) == 0:
                    self.root.mkdir(parents=True, exist_ok=True)
                    self._clear_leftovers()
                    aside.mkdir()
            records, is_another_folder = self._write_files(aside, write, text)
            with ranks.failing_together(group):
                if ranks.rank(group) == 0:
                    write_manifest(aside, records)
                    write_atomic(note, f"{iteration}\n")  # from here on, nothing needs space on the disk
                    self._publish(aside, final)
                    note.replace(self.root / _LATEST)
                    fsync_directory(self.root)
                    self._prune(iteration)
            if is_another_folder:
                with suppress(OSError):  # it is only disk space
                    self._clear_leftovers()
        except OSError as error:
            if ranks.rank(group) == 0:
                shutil.rmtree(aside, ignore_errors=True)
                with suppress(OSError):  # the first error is the one to report
                    note.unlink()
            message = f"the checkpoint of iteration {iteration} could not be written in {self.root}: {describe(error)}"
            raise OSError(error.errno, message) from error

    def iterations(self) -> list[int]:
        """Return the iterations that have a folder, complete or not, in ascending order."""
        return sorted(_find_folders(self.root))

    def digest(self, iteration: int | None = None) -> str:
        """Return the digest of a checkpoint, by default of the last one, by its manifest alone. ValueError where there
        is none."""
        folders = _find_folders(self.root)
        chosen = max(folders, default=None) if iteration is None else iteration
        if chosen not in folders:
            which = "" if iteration is None else f" of iteration {iteration}"
            raise ValueError(f"{self.root}: holds no checkpoint{which}")
        return tensors_digest(folders[chosen], STATE_FILE)

    def checkpoint(self, iteration: int) -> Checkpoint:
        """Open the checkpoint of an iteration; ValueError where it is missing or damaged. Collective."""
        folders = ranks.from_first_rank(_find_folders(self.root) if ranks.rank(self.group) == 0 else {}, self.group)
        if iteration not in folders:
            legal = ", ".join(map(str, sorted(folders))) or "none"
            raise ValueError(f"{self.root}: no checkpoint of iteration {iteration}; there are: {legal}")
        checkpoint, damage = self._open(iteration, folders[iteration])
        if checkpoint is None:
            raise ValueError(f"{folders[iteration]}: the checkpoint is damaged: {damage}")
        return checkpoint

    def newest_complete(self) -> Checkpoint | None:
        """Open the newest complete checkpoint, and warn of damaged ones; None where there is no checkpoint at all.

        Raises ValueError where all checkpoints are damaged, or where only the file that names the latest is left, so
        that a run does not start again from the beginning unnoticed. Collective.
        """
        folders = ranks.from_first_rank(_find_folders(self.root) if ranks.rank(self.group) == 0 else {}, self.group)
        damaged = []
        for iteration in sorted(folders, reverse=True):
            folder = folders[iteration]
            checkpoint, damage = self._open(iteration, folder)
            if checkpoint is not None:
                return checkpoint
            if ranks.rank(self.group) == 0:
                logger.warning("checkpoint %s is damaged and not used: %s", folder, damage)
            damaged.append(f"{folder} ({damage})")
        if damaged:
            raise ValueError(f"every checkpoint is damaged: {'; '.join(damaged)}. Restore one, or remove them all")
        if ranks.from_first_rank((self.root / _LATEST).exists(), self.group):
            raise ValueError(
                f"{self.root / _LATEST} names a checkpoint, but none is there. Restore one, or remove this file too"
            )
        return None

    def _open(self, iteration: int, folder: Path) -> tuple[Checkpoint | None, str | None]:
        """Open the checkpoint in `folder`, or return what is wrong with it."""
        bring_checkpoint(folder, self.root / (_ASIDE + folder.name), self.group)
        if damage := find_damage(folder, STATE_FILE, self.group):
            return None, damage
        values: dict[str, Any] = {}
        if ranks.rank(self.group) == 0:
            try:
                values = read_state(folder)
            except ValueError as error:
                damage = f"{STATE_FILE}: {error}"
        values, damage = ranks.from_first_rank((values, damage), self.group)
        return (None, damage) if damage else (Checkpoint(iteration, folder, values, self.group), None)

    def _write_files(self, folder: Path, write: WriteTensors, text: str) -> tuple[dict[str, FileRecord], bool]:
        """Write every rank's shards and the state. Returns the manifest's records of all files, and whether rank 0 does
        not see this rank's."""
        group = self._writing_group
        with ranks.failing_together(group):
            folder.mkdir(parents=True, exist_ok=True)  # where a host does not share rank 0's file system
        names = write(folder)
        with ranks.failing_together(group):
            if ranks.rank(group) == 0:
                write_atomic(folder / STATE_FILE, text)
                names.append(STATE_FILE)
            local_records = {name: record_file(folder / name) for name in names}
        records: dict[str, FileRecord] = {}
        for part in ranks.gather(local_records, group):
            records |= part
        return records, collect_files(folder, names, group)

    def _publish(self, aside: Path, final: Path) -> None:
        replaced = self.root / (_REPLACED + final.name)
        if final.exists():  # it is damaged, or the run has resumed from an earlier one
            final.rename(replaced)
        aside.rename(final)
        fsync_directory(self.root)
        shutil.rmtree(replaced, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        """Undo or remove what a killed save has left unfinished."""
        for folder in _find_folders(self.root).values():
            if folder.name.startswith(_REPLACED):  # killed between the two renames
                folder.rename(self.root / folder.name.removeprefix(_REPLACED))
        for leftover in self.root.glob(_ASIDE + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for note in (*self.root.glob(_ASIDE + _LATEST), *self.root.glob(f".{_ASIDE}{_LATEST}.tmp-*")):
            note.unlink()

    def _prune(self, newest: int) -> None:
        if self.keep is None:
            return
        older = [iteration for iteration in self.iterations() if iteration < newest]
        for iteration in older[: max(0, len(older) + 1 - self.keep)]:
            if self.retains(iteration):
                continue
            folder = self.root / _folder_name(iteration)
            hidden = self.root / (_ASIDE + "pruned-" + folder.name)
            folder.rename(hidden)  # so that a kill leaves nothing half-deleted that looks like a checkpoint
            shutil.rmtree(hidden, ignore_errors=True)


class _Background(threading.Thread):
    """A thread that writes a checkpoint. It is not a daemon, so a process that ends because of an error finishes the
    checkpoint in flight first."""

    failure: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # wait() raises it, whatever it is
            self.failure = error


def _folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _find_folders(root: Path) -> dict[int, Path]:
    """Return the folder of each iteration. A folder that was being replaced when the run was killed counts until its
    replacement exists."""
    folders = {}
    for prefix in (_REPLACED, ""):
        for path in root.glob(prefix + "iter_*"):
            match = re.fullmatch(r"iter_(\d{7,})", path.name.removeprefix(prefix))
            if match and path.name == prefix + _folder_name(int(match[1])):
                folders[int(match[1])] = path
    return folders


def _checked(iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Return the state as text; ValueError for what cannot be saved."""
    if iteration < 0:
        raise ValueError(f"iteration is {iteration}; it counts from 0")
    check_tensors(tensors)
    return dump_state(state)
