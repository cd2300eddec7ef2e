"""Records the losses of each step in the curriculum one step late: while the next one computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import BlockLosses, StepLosses
from megatron_lfr.lfr import BaseCurriculum
from megatron_lfr.training.times import Stopwatch


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step, `step` counted from 1 as users read it."""

    step: int
    loss: float
    """Mean loss per valid token of the global batch (nats)."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    skipped: bool
    """Whether the weights stayed as they were because the loss or the gradient was not finite."""
    blocks: BlockLosses
    """The losses of the blocks of the global batch, row by row."""
    lr: float
    seconds: float
    """The step's wall time: waiting for its data, computing, recording its losses; without what comes between steps."""
    wait_seconds: float
    """The part of `seconds` that was spent waiting for the loader."""
    record_seconds: float
    """The part of `seconds` that was spent recording losses."""


class Recorder:
    """Waits for the losses of a step once the next one is launched, or when asked, and then records and reports them.

    report: is called with each recorded step. max_skipped_steps: raises FloatingPointError when this many consecutive
    steps were skipped.
    """

    def __init__(
        self, curriculum: BaseCurriculum, max_skipped_steps: int, times: Stopwatch, report: Callable[[StepReport], None]
    ) -> None:
        self.consumed_samples = 0
        self.skipped_steps = 0
        self._curriculum = curriculum
        self._max_skipped_steps = max_skipped_steps
        self._times = times
        self._report = report
        self._skipped_blocks: list[npt.NDArray[np.int64]] = []
        self._pending: Callable[[], None] | None = None

    def add(self, batch: Batch, losses: StepLosses, lr: float, seconds: float, wait_seconds: float) -> None:
        """Record the losses of the step before, and keep those of a step that has been launched."""
        self.finish()
        self._pending = functools.partial(self._record, batch, losses, lr, seconds, wait_seconds)

    def finish(self) -> None:
        """Record and report the last step, if it has not been yet."""
        record, self._pending = self._pending, None
        if record is not None:
            record()

    def _record(self, batch: Batch, losses: StepLosses, lr: float, seconds: float, wait_seconds: float) -> None:
        with self._times.part("training steps") as arriving:
            blocks = losses.wait()
        with self._times.part("recording losses") as recording:
            if losses.skipped:
                self._curriculum.skip(batch.step)
            else:
                self._curriculum.record(batch.step, *blocks)
        self.consumed_samples += int((batch.block_ids >= 0).sum())
        self._count_skipped(batch, losses.skipped)
        self._report(
            StepReport(
                step=batch.step + 1,
                loss=losses.loss,
                grad_norm=losses.grad_norm,
                skipped=losses.skipped,
                blocks=blocks,
                lr=lr,
                seconds=seconds + arriving.seconds + recording.seconds,
                wait_seconds=wait_seconds,
                record_seconds=recording.seconds,
            )
        )

    def _count_skipped(self, batch: Batch, skipped: bool) -> None:
        if not skipped:
            self._skipped_blocks.clear()
            return
        self.skipped_steps += 1
        self._skipped_blocks.append(batch.block_ids[batch.block_ids >= 0])
        if len(self._skipped_blocks) >= self._max_skipped_steps:
            blocks = ", ".join(map(str, np.concatenate(self._skipped_blocks)[:64]))
            raise FloatingPointError(
                f"loss or gradient not finite in {len(self._skipped_blocks)} consecutive steps up to step "
                f"{batch.step + 1} (--max-skipped-steps); their blocks: {blocks}"
            )
