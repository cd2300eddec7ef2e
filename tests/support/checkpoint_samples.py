"""Small checkpoints, each of which is filled with one number, so that a mix of two shows."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.checkpoint.manifest import record_file, write_manifest


def some_tensors(fill: float = 1.0) -> dict[str, Tensor]:
    return {
        "model.weight": torch.full((3, 5), fill),
        "model.half": torch.full((4,), fill, dtype=torch.bfloat16),
        "optimizer.step": torch.tensor(fill),
        "counts": torch.full((7,), int(fill)),
        "nothing": torch.zeros(0, 3),
    }


def save_filled(store: CheckpointStore, iteration: int, fill: int) -> None:
    store.save(iteration, some_tensors(float(fill)), {"fill": fill})


def store_with(root: Path, *iterations: int, keep: int | None = None) -> CheckpointStore:
    """Return a store of checkpoints, each of which is filled with its iteration."""
    store = CheckpointStore(root, keep)
    for iteration in iterations:
        save_filled(store, iteration, iteration)
    return store


def newest(root: Path) -> tuple[int, int] | None:
    """Return the iteration and the fill of the newest complete checkpoint, of which every part has been looked at."""
    checkpoint = CheckpointStore(root, None).newest_complete()
    if checkpoint is None:
        return None
    tensors = some_tensors(0.0)
    checkpoint.load_into(tensors)
    values = {float(value) for tensor in tensors.values() for value in tensor.flatten()}
    assert values == {float(checkpoint.state["fill"])}
    return checkpoint.iteration, checkpoint.state["fill"]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """In this process, writing past `size` bytes fails, as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def vouch(folder: Path) -> None:
    """Make the manifest fit the files, as one who tampers would."""
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder, {path.name: record_file(path) for path in folder.iterdir()})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
