"""The checkpoints of a run: written so that a kill at any moment leaves the last whole one in force.

    checkpoints/iter_0000100/        __*.safetensors (torch.distributed.checkpoint), state.json, manifest.json
    checkpoints/latest_checkpointed_iteration.txt

A folder is written aside, every file is fsynced, the folder is renamed, and only then is it named as the latest.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_lfr.checkpoint.manifest import find_damage, write_manifest
from megatron_lfr.fileio import fsync_directory, write_atomic

logger = logging.getLogger(__name__)

_STATE = "state.json"
_LATEST = "latest_checkpointed_iteration.txt"
_ASIDE = ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its iteration, its JSON state, and its tensors on disk."""

    iteration: int
    folder: Path
    state: dict[str, Any]

    def load_into(self, tensors: Mapping[str, Tensor], *, allow_extra: bool = False) -> None:
        """Overwrite `tensors` in place with those of the same names.

        ValueError names the first tensor that is missing on either side, or differs in shape or type. `allow_extra`:
        the checkpoint may hold tensors that are not asked for.
        """
        reader = HuggingFaceStorageReader(str(self.folder))
        stored = reader.read_metadata().state_dict_metadata
        targets = {name: _at_least_1d(tensor) for name, tensor in tensors.items()}
        for name, tensor in targets.items():
            found = stored.get(name)
            if not isinstance(found, TensorStorageMetadata):
                raise ValueError(f"{self.folder}: holds no tensor {name}; another model, or another optimizer?")
            if found.size != tensor.shape or found.properties.dtype != tensor.dtype:
                raise ValueError(
                    f"{self.folder}: tensor {name} is {found.properties.dtype} {list(found.size)}, "
                    f"here it is {tensor.dtype} {list(tensor.shape)}"
                )
        if not allow_extra and (extra := sorted(set(stored) - set(targets))):
            raise ValueError(f"{self.folder}: holds the tensor {extra[0]}, which is unknown here")
        load(dict(targets), storage_reader=reader, no_dist=not dist.is_initialized())


class CheckpointStore:
    """The checkpoints in `root`, of which the newest `keep` are kept (None: all).

    Every rank of the default process group makes the same calls; `root` is on a file system that all of them see.
    """

    def __init__(self, root: Path, keep: int | None) -> None:
        self.root = root
        self.keep = keep

    def save(self, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest. `state` must be JSON-able.

        OSError where it cannot be written; the checkpoints that were there before are then untouched.
        """
        text = json.dumps(state, indent=1, allow_nan=False)
        final = self.root / _folder_name(iteration)
        aside = self.root / (_ASIDE + final.name)
        if _is_first_rank():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        _barrier()
        try:
            self._write_tensors(aside, tensors)
            if _is_first_rank():
                (aside / _STATE).write_text(text, encoding="utf-8")
                write_manifest(aside)
        except OSError as error:
            if _is_first_rank():
                shutil.rmtree(aside, ignore_errors=True)
            raise OSError(error.errno, f"checkpoint of step {iteration} could not be written: {error}") from error
        _barrier()
        if _is_first_rank():
            self._put_in_place(aside, final)
            write_atomic(self.root / _LATEST, f"{iteration}\n")
            self._prune(iteration)
        _barrier()
        return final

    def iterations(self) -> list[int]:
        """The iterations that a folder stands for, whole or not, in ascending order."""
        found = [re.fullmatch(r"iter_(\d{7,})", path.name) for path in self.root.glob("iter_*")]
        return sorted(int(match[1]) for match in found if match)

    def newest_whole(self) -> Checkpoint | None:
        """The newest checkpoint without damage; damaged ones are named in warnings. None where there is none at all.

        ValueError where all of them are damaged: a run must not begin anew unnoticed.
        """
        if _is_first_rank():
            for leftover in self.root.glob(_ASIDE + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
        damaged = []
        for iteration in reversed(self.iterations()):
            folder = self.root / _folder_name(iteration)
            damage = find_damage(folder)
            if damage is None:
                state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
                return Checkpoint(iteration, folder, state)
            logger.warning("checkpoint %s is damaged and not used: %s", folder, damage)
            damaged.append(f"{folder} ({damage})")
        if damaged:
            raise ValueError(f"every checkpoint is damaged: {'; '.join(damaged)}. Restore one, or remove them all")
        return None

    def _write_tensors(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            save(
                {name: _at_least_1d(tensor) for name, tensor in tensors.items()},
                storage_writer=writer,
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:  # not an Exception: it derives from BaseException
            causes = [failure[0] for failure in error.failures.values()]
            raise OSError(getattr(causes[0], "errno", None), str(causes[0])) from error

    def _put_in_place(self, aside: Path, final: Path) -> None:
        fsync_directory(aside)
        if final.exists():  # damaged, or the run went back behind it
            final.rename(self.root / f"{_ASIDE}replaced-{final.name}")
        aside.rename(final)
        fsync_directory(self.root)
        shutil.rmtree(self.root / f"{_ASIDE}replaced-{final.name}", ignore_errors=True)

    def _prune(self, newest: int) -> None:
        if self.keep is None:
            return
        older = [iteration for iteration in self.iterations() if iteration < newest]
        for iteration in older[: max(0, len(older) + 1 - self.keep)]:
            folder = self.root / _folder_name(iteration)
            doomed = self.root / (_ASIDE + "pruned-" + folder.name)
            folder.rename(doomed)  # so that a kill leaves nothing half-deleted that looks like a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


def _folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _at_least_1d(tensor: Tensor) -> Tensor:
    """A view with a dimension to slice, which the safetensors reader needs."""
    return tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
