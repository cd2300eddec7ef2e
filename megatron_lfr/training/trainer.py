"""The loop: steps inside phases, and what happens between steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.data.corpus.blocks import BlockSource
from megatron_lfr.data.corpus.loader import Batch, Loader, check_vocabulary
from megatron_lfr.engine import Engine, PendingStep, StepOutput
from megatron_lfr.engine.optimizer import LearningRate
from megatron_lfr.lfr import Course
from megatron_lfr.parallel import ranks
from megatron_lfr.training.callbacks import Callback, StepReport
from megatron_lfr.training.config import CheckpointConfig, TrainingConfig
from megatron_lfr.training.evaluation import evaluate
from megatron_lfr.training.patience import Patience
from megatron_lfr.training.stopping import StoppedError, Stopping
from megatron_lfr.training.times import Stopwatch


@dataclass(frozen=True)
class _TakenStep:
    """A step whose losses are still on their way."""

    batch: Batch
    output: PendingStep
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
        stopping: Stopping,
        times: Stopwatch,
        patience: Patience,
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
        self.stopping = stopping
        self.times = times
        self.patience = patience
        self.consumed_samples = 0
        self.skipped_steps = 0
        self._skipped_blocks: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._taken: _TakenStep | None = None
        self._owes_evaluation = False  # of the last step; a stop has cut it short
        self._saved_at = time.perf_counter()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's JSON state, whose tensors the engine has already; {} at step 0."""
        if state:
            self.curriculum.load_state_dict(state["curriculum"])
            self.consumed_samples = int(state["consumed_samples"])
            self.skipped_steps = int(state["skipped_steps"])
            self._owes_evaluation = bool(state.get("owes_evaluation", False))
        for callback in self.callbacks:
            callback.load_state_dict(state.get("callbacks", {}).get(type(callback).__name__, {}))

    def run(self) -> bool:
        """Train to the end of the schedule. False when a signal or an exit limit stopped it first."""
        self.times.start()
        self._saved_at = time.perf_counter()
        with self.stopping.watching():
            try:
                self._run_phases()
                with self.times.part("saving"):
                    self.store.wait()  # the run has ended, or may be left, once its last checkpoint is whole
                if self._is_complete:
                    self._tell(lambda callback: callback.on_end(self))
            except BaseException:
                with suppress(Exception):  # the first error is the one to tell
                    self.store.wait()  # no one else may write there before this has ended
                raise
            finally:
                for callback in self.callbacks:
                    callback.close()
        return self._is_complete

    @property
    def _is_complete(self) -> bool:
        return self.curriculum.finished and not self._owes_evaluation

    def _run_phases(self) -> None:
        if self._owes_evaluation:
            self._between_steps(self.curriculum.next_step, evaluates=True, saves=False)
        try:
            while not self.curriculum.finished and self.stopping.reason is None:
                self._run_phase()
        except StoppedError as stop:  # while blocks were scored; the checkpoint before that stands
            _say(f"{stop}: leaving before step {self.curriculum.next_step + 1}; the same command continues")

    def _run_phase(self) -> None:
        is_new = self.curriculum.at_boundary
        with self.times.part("making orders"):
            start = self.curriculum.enter_phase()
        if is_new:
            self._tell(lambda callback: callback.on_phase_start(self, start))
        batches = self.train_loader.iterate(self.curriculum.remaining_steps())
        for batch, waited in self.times.each("waiting for data", batches):
            self._train_one(batch, waited)
            if self.stopping.reason is not None:
                return

    def _train_one(self, batch: Batch, waited: float) -> None:
        check_vocabulary(batch, self.engine.vocab_size)
        lr, done = self.learning_rate(batch.step), batch.step + 1
        with self.times.part("training steps") as span:
            agreed = self.stopping.ask(done, save=self._wants_to_save())
            output = self.engine.train_step(batch, lr)
            wants_to_save = agreed()
        self._finish_step()
        self._taken = _TakenStep(batch, output, lr, span.seconds + waited, waited)
        assert self.curriculum.current is not None
        phase_ends = done == self.curriculum.current.planned.end_step
        evaluates = phase_ends or _due(done, self.config.eval_interval)
        saves = wants_to_save or _due(done, self.checkpoint.save_interval)
        if evaluates or saves or self.stopping.reason is not None:
            self._finish_step()
            self._between_steps(done, evaluates, saves)

    def _finish_step(self) -> None:
        """Record and log the last step, if that is still to be done."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        batch = taken.batch
        with self.times.part("training steps") as arriving:
            output = taken.output.wait()
        with self.times.part("recording losses") as recording:
            if output.skipped:
                self.curriculum.skip(batch.step)
            else:
                self.curriculum.record(batch.step, output.blocks.nll_sum, output.blocks.token_count)
        self.consumed_samples += int((batch.block_ids >= 0).sum())
        self._count_skipped(batch, output)
        seconds = taken.seconds + arriving.seconds + recording.seconds
        report = StepReport(batch.step + 1, output, taken.lr, seconds, taken.wait_seconds, recording.seconds)
        self._tell(lambda callback: callback.on_step_end(self, report))

    def _between_steps(self, done: int, evaluates: bool, saves: bool) -> None:
        if evaluates:
            self._evaluate(done)
        stops = self.stopping.reason is not None and not self._is_complete
        if stops:
            _say(f"{self.stopping.reason}: saving at step {done} and leaving; the same command continues")
        if saves or stops or self.curriculum.finished or (self.curriculum.at_boundary and self._next_phase_rescores()):
            self.save()

    def save(self) -> None:
        """Write a checkpoint of everything the run continues from."""
        self._saved_at = time.perf_counter()
        with self.times.part("saving") as span:
            for callback in self.callbacks:
                callback.before_checkpoint(self)
            state = {
                "identity": self.identity,
                "curriculum": self.curriculum.state_dict(),
                "consumed_samples": self.consumed_samples,
                "skipped_steps": self.skipped_steps,
                "owes_evaluation": self._owes_evaluation,
                "callbacks": {type(callback).__name__: callback.state_dict() for callback in self.callbacks},
            }
            self.store.save(self.curriculum.next_step, self.engine.tensors(), state)
        if not self.store.asynchronous and (note := self.patience.measured(span.seconds)):
            _say(note)

    def _wants_to_save(self) -> bool:
        """Whether it is time for a checkpoint by rank 0's clock, which counts for all."""
        minutes = self.checkpoint.save_interval_mins or math.inf
        return ranks.rank() == 0 and time.perf_counter() - self._saved_at > 60 * minutes

    def _evaluate(self, done: int) -> None:
        if self.valid_source.num_blocks == 0:
            return
        try:
            with self.times.part("evaluation"):
                evaluation = evaluate(
                    self.engine,
                    self.valid_loader,
                    self.valid_source,
                    max_blocks=self.evaluated_blocks,
                    step=done,
                    phase=self.plan.at_step(done - 1).index,
                    between=self.stopping.look,
                )
        except StoppedError:  # it is made up for when the run goes on
            self._owes_evaluation = True
            return
        self._owes_evaluation = False
        self._tell(lambda callback: callback.on_evaluation(self, evaluation))

    @property
    def evaluated_blocks(self) -> int:
        """Blocks of the validation split that an evaluation takes."""
        limit = self.config.eval_iters
        blocks = self.valid_source.num_blocks
        return blocks if limit is None else min(blocks, limit * self.plan.global_batch_size)

    def _tell(self, event: Callable[[Callback], None]) -> None:
        with self.times.part("logging"):
            for callback in self.callbacks:
                event(callback)

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


def _say(text: str) -> None:
    if ranks.rank() == 0:
        print(text, flush=True)


def _due(done: int, interval: int | None) -> bool:
    return interval is not None and done % interval == 0
