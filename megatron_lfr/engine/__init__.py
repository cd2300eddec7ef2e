"""What makes one optimizer step out of a global batch."""

from megatron_lfr.engine.base import BlockLosses, Engine, StepOutput
from megatron_lfr.engine.native import NativeEngine

__all__ = ["BlockLosses", "Engine", "NativeEngine", "StepOutput"]
