"""Two ranks, of a machine each, that train through the command line; one of them sees an infinite gradient."""

from __future__ import annotations

import os
from typing import Any

import torch

from megatron_lfr.cli import main as megatron_lfr
from megatron_lfr.data.loader import Batch
from megatron_lfr.engine import NativeEngine, StepOutput

SKIPPED = 2


def overflow(engine: NativeEngine, batch: Batch, lr: float, **asked: bool) -> StepOutput:
    """NativeEngine.train_step with an infinite gradient of one weight that no other rank holds."""
    finish = engine.gradients.finish

    def finish_with_infinity() -> None:
        finish()
        engine.parameters[0].local_grad()[0, 0] = float("inf")

    engine.gradients.finish = finish_with_infinity  # type: ignore[method-assign]
    try:
        return TRAIN_STEP(engine, batch, lr, **asked)
    finally:
        engine.gradients.finish = finish  # type: ignore[method-assign]


TRAIN_STEP = NativeEngine.train_step


def main(rank: int, port: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})

    def train_step(engine: NativeEngine, batch: Batch, *given: Any, **more: Any) -> StepOutput:
        step = overflow if (rank, batch.step) == (1, SKIPPED) else TRAIN_STEP
        return step(engine, batch, *given, **more)

    NativeEngine.train_step = train_step  # type: ignore[method-assign]
    assert megatron_lfr(["train", *arguments]) == 0
