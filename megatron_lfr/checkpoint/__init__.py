"""Checkpoints: tensors as safetensors, everything else as JSON; nothing in them can execute code."""

from megatron_lfr.checkpoint.store import Checkpoint, CheckpointStore

__all__ = ["Checkpoint", "CheckpointStore"]
