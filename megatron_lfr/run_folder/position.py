"""Where in its run a checkpoint was written: what the trainer stores beside the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lfr.checkpoint import Checkpoint


@dataclass(frozen=True)
class Position:
    """The step of a checkpoint, and how much of the journal and of metrics.jsonl belongs to it.

    phase, entries: the journal's last phase, -1 before the first, and its samples so far. checksum: zlib.crc32 of all
    losses until then. metrics_bytes: the length of metrics.jsonl.
    """

    step: int
    phase: int
    entries: int
    checksum: int
    metrics_bytes: int


def read_position(checkpoint: Checkpoint) -> Position:
    """Return the position of a run's checkpoint. ValueError for a state that is not as this version writes it."""
    from megatron_lfr.checkpoint.state import STATE_FILE  # and PyTorch, without which run folders are read

    state, path = checkpoint.state, checkpoint.folder / STATE_FILE
    try:
        curriculum, callbacks = state["curriculum"], state["callbacks"]
        numbers = [curriculum[name] for name in ("step", "phase", "entries", "checksum")]
        numbers.append(callbacks.get("MetricsFile", {}).get("bytes", 0))
        counts = [state["consumed_samples"], state["skipped_steps"]]
        is_complete = all(isinstance(number, int) for number in numbers + counts) and "identity" in state
    except (KeyError, TypeError, AttributeError):
        is_complete = False
    if not is_complete:
        raise ValueError(f"{path}: not the state of a run, as this version of megatron_lfr writes it")
    position = Position(*numbers)
    if position.step != checkpoint.iteration:
        raise ValueError(f"{path}: belongs to step {position.step}, but its folder's name to {checkpoint.iteration}")
    return position
