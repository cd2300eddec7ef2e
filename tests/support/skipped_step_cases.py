"""A gradient that is infinite on one of two ranks."""

from __future__ import annotations

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import NativeEngine, StepLosses

SKIPPED = 2


def overflow_on_rank_1(rank: int) -> None:
    """In step SKIPPED, the gradient of a weight that rank 1 alone holds is infinite."""
    original = NativeEngine.train_step

    def train_step(engine: NativeEngine, batch: Batch, lr: float) -> StepLosses:
        finish = engine.gradients.finish

        def finish_with_infinity() -> None:
            finish()
            engine.parameters[0].local_grad()[0, 0] = float("inf")

        if (rank, batch.step) == (1, SKIPPED):
            engine.gradients.finish = finish_with_infinity  # type: ignore[method-assign]
        output = original(engine, batch, lr)
        engine.gradients.finish = finish  # type: ignore[method-assign]
        return output

    NativeEngine.train_step = train_step  # type: ignore[method-assign]
