"""Engines, which make one optimizer step of a global batch."""

from megatron_lfr.engine.base import BlockLosses, Engine, Evaluator, PendingLosses, StepLosses
from megatron_lfr.engine.build import build_stages
from megatron_lfr.engine.forward import ForwardEngine
from megatron_lfr.engine.native import NativeEngine
from megatron_lfr.engine.sharding import shard_stages

__all__ = [
    "BlockLosses",
    "Engine",
    "Evaluator",
    "ForwardEngine",
    "NativeEngine",
    "PendingLosses",
    "StepLosses",
    "build_stages",
    "shard_stages",
]
