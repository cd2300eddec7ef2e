"""The loop: steps inside phases, and what happens between steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

from megatron_lfr.checkpoint import CheckpointStore, ranks
from megatron_lfr.data.blocks import BlockSource
from megatron_lfr.data.loader import Batch, Loader, check_vocabulary
from megatron_lfr.engine import Engine, StepOutput
from megatron_lfr.engine.optimizer import LearningRate
from megatron_lfr.lfr import Course
from megatron_lfr.training.callbacks import Callback, StepReport
from megatron_lfr.training.config import CheckpointConfig, TrainingConfig
from megatron_lfr.training.evaluation import evaluate


@dataclass(frozen=True)
class _TakenStep:
    """A step whose blocks' losses are still on their way from other ranks."""

    batch: Batch
    output: StepOutput
    lr: float
    seconds: float
    wait_seconds: float


class Trainer:
    """Runs a curriculum to its end, or to a signal, through one engine. Every rank runs one; callbacks, and what is
    printed, are rank 0's.

    Events of a step come in this order, so that a checkpoint holds everything that belongs to it: record, log,
    evaluate, checkpoint. The first two come while the next step computes, unless something follows that needs them.
    What only one feature needs is a callback.
    """

    def __init__(
        self,
        engine: Engine,
        curriculum: Course,
        train_source: BlockSource,
        train_loader: Loader,
        valid_source: BlockSource,
        valid_loader: Loader,
        learning_rate: LearningRate,
        store: CheckpointStore,
        config: TrainingConfig,
        checkpoint: CheckpointConfig,
        identity: Mapping[str, Any],
        callbacks: Sequence[Callback],
    ) -> None:
        self.engine = engine
        self.curriculum = curriculum
        self.plan = curriculum.plan
        self.train_source = train_source
        self.train_loader = train_loader
        self.valid_source = valid_source
        self.valid_loader = valid_loader
        self.learning_rate = learning_rate
        self.store = store
        self.config = config
        self.checkpoint = checkpoint
        self.identity = dict(identity)
        self.callbacks = list(callbacks)
        self._taken: _TakenStep | None = None
        self.consumed_samples = 0
        self.skipped_steps = 0
        self._skipped_blocks: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._signal: str | None = None  # set by a handler at any moment, looked at once a step
        self._stop_reason: str | None = None
        self._started = self._last_step_end = time.perf_counter()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's JSON state, whose tensors the engine has already; {} at step 0."""
        if state:
            self.curriculum.load_state_dict(state["curriculum"])
            self.consumed_samples = int(state["consumed_samples"])
            self.skipped_steps = int(state["skipped_steps"])
        for callback in self.callbacks:
            callback.load_state_dict(state.get("callbacks", {}).get(type(callback).__name__, {}))

    def run(self) -> bool:
        """Train to the end of the schedule. False when a signal or an exit limit stopped it first."""
        before = self._watch_signals()
        self._started = self._last_step_end = time.perf_counter()
        try:
            while not self.curriculum.finished and self._stop_reason is None:
                self._run_phase()
            self.store.wait()  # the run has ended, or may be left, once its last checkpoint is whole
            if self.curriculum.finished:
                for callback in self.callbacks:
                    callback.on_end(self)
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                self.store.wait()  # no one else may write there before this has ended
            raise
        finally:
            for callback in self.callbacks:
                callback.close()
        # Not after an error: where a rank is gone, its launcher stops the others, which have yet to say why they end.
        for number, handler in before.items():
            signal.signal(number, handler)
        return self.curriculum.finished

    def _run_phase(self) -> None:
        is_new = self.curriculum.at_boundary
        start = self.curriculum.enter_phase()
        if is_new:
            for callback in self.callbacks:
                callback.on_phase_start(self, start)
        waited = self.train_loader.wait_seconds
        for batch in self.train_loader.iterate(self.curriculum.remaining_steps()):
            self._train_one(batch, self.train_loader.wait_seconds - waited)
            if self._stop_reason is not None:
                return
            waited = self.train_loader.wait_seconds

    def _train_one(self, batch: Batch, waited: float) -> None:
        check_vocabulary(batch, self.engine.vocab_size)
        lr, done = self.learning_rate(batch.step), batch.step + 1
        reason = self._signal or self._exit_reason(done)
        output = self.engine.train_step(batch, lr, stop=reason is not None)
        if output.stop:
            self._stop_reason = reason or "another rank was asked to stop"
        now = time.perf_counter()
        seconds, self._last_step_end = now - self._last_step_end, now
        self._finish_step()
        self._taken = _TakenStep(batch, output, lr, seconds, waited)
        assert self.curriculum.current is not None
        phase_ends = done == self.curriculum.current.planned.end_step
        evaluates = phase_ends or _due(done, self.config.eval_interval)
        if evaluates or output.stop or _due(done, self.checkpoint.save_interval):
            self._finish_step()
            self._between_steps(done, evaluates)

    def _finish_step(self) -> None:
        """Record and log the last step, if that is still to be done."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        batch, blocks = taken.batch, taken.output.blocks.wait()
        if taken.output.skipped:
            self.curriculum.skip(batch.step)
        else:
            self.curriculum.record(batch.step, blocks.nll_sum, blocks.token_count)
        self.consumed_samples += int((batch.block_ids >= 0).sum())
        self._count_skipped(batch, taken.output)
        report = StepReport(batch.step + 1, taken.output, blocks, taken.lr, taken.seconds, taken.wait_seconds)
        for callback in self.callbacks:
            callback.on_step_end(self, report)

    def _between_steps(self, done: int, evaluates: bool) -> None:
        if evaluates:
            self._evaluate(done)
        if self._stop_reason is not None and not self.curriculum.finished and ranks.rank() == 0:
            print(f"{self._stop_reason}: saving at step {done} and leaving; the same command continues", flush=True)
        if (
            self.curriculum.finished
            or self._stop_reason is not None
            or _due(done, self.checkpoint.save_interval)
            or (self.curriculum.at_boundary and self._next_phase_rescores())
        ):
            self.save()

    def save(self) -> None:
        """Write a checkpoint of everything the run continues from."""
        for callback in self.callbacks:
            callback.before_checkpoint(self)
        state = {
            "identity": self.identity,
            "curriculum": self.curriculum.state_dict(),
            "consumed_samples": self.consumed_samples,
            "skipped_steps": self.skipped_steps,
            "callbacks": {type(callback).__name__: callback.state_dict() for callback in self.callbacks},
        }
        self.store.save(self.curriculum.next_step, self.engine.tensors(), state)

    def _evaluate(self, done: int) -> None:
        if self.valid_source.num_blocks == 0:
            return
        limit = self.config.eval_iters
        evaluation = evaluate(
            self.engine,
            self.valid_loader,
            self.valid_source,
            max_blocks=None if limit is None else limit * self.plan.global_batch_size,
            step=done,
            phase=self.plan.at_step(done - 1).index,
        )
        for callback in self.callbacks:
            callback.on_evaluation(self, evaluation)
        self._last_step_end = time.perf_counter()

    def _count_skipped(self, batch: Batch, output: StepOutput) -> None:
        if not output.skipped:
            self._skipped_blocks.clear()
            return
        self.skipped_steps += 1
        self._skipped_blocks.append(batch.block_ids[batch.block_ids >= 0])
        if len(self._skipped_blocks) >= self.config.max_skipped_steps:
            blocks = ", ".join(map(str, np.concatenate(self._skipped_blocks)[:64]))
            raise FloatingPointError(
                f"loss or gradient not finite in {len(self._skipped_blocks)} consecutive steps up to step "
                f"{batch.step + 1} (--max-skipped-steps); their blocks: {blocks}"
            )

    def _next_phase_rescores(self) -> bool:
        if self.curriculum.finished:
            return False
        return self.plan.at_step(self.curriculum.next_step).phase.is_rescored

    def _exit_reason(self, done: int) -> str | None:
        minutes = self.config.exit_duration_in_mins
        if _due(done, self.config.exit_interval):
            return f"--exit-interval {self.config.exit_interval}"
        if minutes is not None and time.perf_counter() - self._started > 60 * minutes:
            return f"--exit-duration-in-mins {minutes:g}"
        return None

    def _watch_signals(self) -> dict[signal.Signals, Any]:
        """Returns the handlers that were there before."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._signal = signal.Signals(number).name

        return {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}


def _due(done: int, interval: int | None) -> bool:
    return interval is not None and done % interval == 0
