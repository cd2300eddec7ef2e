"""The tensors of a checkpoint in two run folders: hard links where the file system has them, else copies.

Links are safe since a checkpoint's files are written once: a store writes new ones aside, renames their folder, and
removes old ones by their names, which leaves other links as they are. What a branch has otherwise than its parent, the
state and the manifest, is written anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.checkpoint import Checkpoint, CheckpointStore
from megatron_lfr.checkpoint.manifest import NAME, FileRecord, read_manifest
from megatron_lfr.checkpoint.state import STATE_FILE


@dataclass(frozen=True)
class Tensors:
    """The files of a checkpoint's tensors, and whether another folder can have links to them."""

    checkpoint: Checkpoint
    records: dict[str, FileRecord]
    are_linked: bool

    @staticmethod
    def of(checkpoint: Checkpoint, target: Path) -> Tensors:
        """Those of `checkpoint`, for the folder `target`."""
        records, damage = read_manifest(checkpoint.folder, STATE_FILE)
        if damage is not None:
            raise ValueError(f"{checkpoint.folder}: the checkpoint is damaged: {damage}")
        del records[STATE_FILE]
        probe = target / "probe"
        try:
            probe.hardlink_to(checkpoint.folder / NAME)
        except OSError:  # another file system, or one without links, or files of another user
            return Tensors(checkpoint, records, are_linked=False)
        probe.unlink()
        return Tensors(checkpoint, records, are_linked=True)

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.records.values())

    def save(self, store: CheckpointStore, step: int, state: Mapping[str, Any]) -> None:
        """Save a checkpoint of these tensors and of `state`. ValueError where a file is not what it was."""
        folder = store.save_files(step, self._write, state)
        for name, record in read_manifest(folder, STATE_FILE)[0].items():
            if name != STATE_FILE and record != self.records[name]:
                raise ValueError(f"{self.checkpoint.folder / name}: its content has changed while it was read")

    def _write(self, folder: Path) -> list[str]:
        for name in self.records:
            source = self.checkpoint.folder / name
            if self.are_linked:
                (folder / name).hardlink_to(source)
            else:
                shutil.copyfile(source, folder / name)
        return list(self.records)
