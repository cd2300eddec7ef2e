"""The training loop: steps inside phases, and what happens between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config.training import CheckpointConfig, TrainingConfig
from megatron_lfr.data.corpus.loader import Loader, check_vocabulary
from megatron_lfr.engine import Engine
from megatron_lfr.learning_rate import LearningRate
from megatron_lfr.lfr import BaseCurriculum
from megatron_lfr.parallel import ranks
from megatron_lfr.training.callbacks import Callback, state_keys
from megatron_lfr.training.evaluation import Validation
from megatron_lfr.training.patience import Patience
from megatron_lfr.training.recording import Recorder, StepReport
from megatron_lfr.training.saving import Saving
from megatron_lfr.training.stopping import StoppedError, Stopping
from megatron_lfr.training.times import Stopwatch
from megatron_lfr.training.upkeep import AfterStep


class Trainer:
    """Trains one engine by a curriculum, to its end or to a signal. Every rank runs a trainer; only rank 0 has
    callbacks and prints. end_step: the last step, which may come before that of the curriculum's plan. peak_tflops: a
    device's, None where it is not known. after_step: is called with the number of steps so far, once each is launched.

    A step's events come in this order, so that a checkpoint holds everything that belongs to it: record, log, evaluate,
    save. What only one feature needs is a callback.
    """

    def __init__(
        self,
        engine: Engine,
        curriculum: BaseCurriculum,
        train_loader: Loader,
        valid_loader: Loader,
        learning_rate: LearningRate,
        end_step: int,
        store: CheckpointStore,
        config: TrainingConfig,
        checkpoint: CheckpointConfig,
        identity: Mapping[str, Any],
        callbacks: Sequence[Callback],
        stopping: Stopping,
        times: Stopwatch,
        patience: Patience,
        peak_tflops: float | None,
        after_step: Sequence[AfterStep],
    ) -> None:
        self.engine = engine
        self.curriculum = curriculum
        self.plan = curriculum.plan
        self.train_source = train_loader.source
        self.train_loader = train_loader
        self.valid_source = valid_loader.source
        self.learning_rate = learning_rate
        self.end_step = end_step
        self.identity = dict(identity)
        self.callbacks = list(callbacks)
        self.stopping = stopping
        self.times = times
        self.patience = patience
        self.peak_tflops = peak_tflops
        self.after_step = after_step
        self.recorder = Recorder(curriculum, config.max_skipped_steps, times, self._report)
        self.validation = Validation(engine, valid_loader, self.plan, config, stopping, times)
        self.saving = Saving(store, checkpoint, patience, times)

    @property
    def consumed_samples(self) -> int:
        """Number of samples of all recorded steps."""
        return self.recorder.consumed_samples

    @property
    def skipped_steps(self) -> int:
        """Number of steps that changed no weights because their loss or gradient was not finite."""
        return self.recorder.skipped_steps

    @property
    def is_complete(self) -> bool:
        """Whether the last step is recorded, and the model evaluated there."""
        return self._at_end and not self.validation.is_owed

    @property
    def _at_end(self) -> bool:
        return self.curriculum.next_step >= self.end_step

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's JSON state, whose tensors the engine has already loaded; {} at step 0."""
        if state:
            self.curriculum.load_state_dict(state["curriculum"])
            self.recorder.consumed_samples = int(state["consumed_samples"])
            self.recorder.skipped_steps = int(state["skipped_steps"])
            self.validation.is_owed = bool(state.get("owes_evaluation", False))
        states = state.get("callbacks", {})
        for key, callback in zip(state_keys(self.callbacks), self.callbacks, strict=True):
            callback.load_state_dict(states.get(key, {}))

    def run(self) -> bool:
        """Train to the end of the schedule. Returns False when a signal or an exit limit stopped it first."""
        self.times.start()
        self.saving.start()
        with self.stopping.watching():
            try:
                self._tell(lambda callback: callback.on_train_start(self))
                self._train()
                self.saving.wait()  # the run has ended, or the process may leave, once its last checkpoint is complete
                self._tell(lambda callback: callback.on_train_end(self))
            except BaseException as error:
                for callback in self.callbacks:
                    with suppress(Exception):  # the first error is the one to raise
                        callback.on_error(self, error)
                with suppress(Exception):
                    self.saving.wait()  # nothing else may write there before this has ended
                for callback in self.callbacks:
                    with suppress(Exception):
                        callback.close()
                raise
            with ExitStack() as closing:  # all of them, whichever fails
                for callback in reversed(self.callbacks):
                    closing.callback(callback.close)
        return self.is_complete

    def _train(self) -> None:
        if self.validation.is_owed:  # the process before was stopped
            self._evaluate(self.curriculum.next_step)
            if self.curriculum.at_boundary:
                self._end_phase()
            self._save(self.curriculum.next_step, is_due=False)
        try:
            while not self._at_end and self.stopping.reason is None:
                self._train_phase()
        except StoppedError as stop:  # while blocks were scored; the checkpoint before that remains
            _say(f"{stop}: leaving before step {self.curriculum.next_step + 1}; the same command continues")

    def _train_phase(self) -> None:
        """Train from the next step to the end of its phase, or to a stop."""
        is_new = self.curriculum.at_boundary
        with self.times.part("making orders"):
            phase = self.curriculum.enter_phase()
        if is_new:
            self._tell(lambda callback: callback.on_phase_start(self, phase))
        batches = self.train_loader.iterate(self.curriculum.remaining_steps())
        for batch, waited in self.times.each("waiting for data", batches):
            check_vocabulary(batch, self.engine.vocab_size)
            done, lr = batch.step + 1, self.learning_rate(batch.step)
            phase_ends, run_ends = done == phase.planned.end_step, done == self.end_step

            # Forward, backward and the optimizer's step; while that computes, the hosts agree on what follows it.
            with self.times.part("training steps") as launching:
                agreed = self.stopping.ask(done, save=self.saving.is_time())
                losses = self.engine.train_step(batch, lr)
                saves = agreed() or self.saving.is_due(done)

            # Record and log: the step before, while this one computes, and this one where something needs it now.
            self.recorder.add(batch, losses, lr, launching.seconds + waited, waited)
            for act in self.after_step:
                act(done)
            evaluates = phase_ends or run_ends or self.validation.is_due(done)
            if not evaluates and not saves and self.stopping.reason is None:
                continue
            self.recorder.finish()

            if evaluates:
                self._evaluate(done)
            if phase_ends:
                self._end_phase()
            self._save(done, is_due=saves)
            if self.stopping.reason is not None or run_ends:
                return

    def _evaluate(self, done: int) -> None:
        evaluation = self.validation.run(done)
        if evaluation is not None:
            self._tell(lambda callback: callback.on_evaluation(self, evaluation))

    def _end_phase(self) -> None:
        """Tell of the end of the current phase, unless a stop has cut its evaluation short: then the process that makes
        up for that tells."""
        phase = self.curriculum.current
        if phase is not None and not self.validation.is_owed:
            self._tell(lambda callback: callback.on_phase_end(self, phase))

    def _save(self, done: int, is_due: bool) -> None:
        """Save after step `done`, if that is due, the run stops or ends, or the next phase may fail to begin."""
        stops = self.stopping.reason is not None and not self.is_complete
        if stops:
            _say(f"{self.stopping.reason}: saving at step {done} and leaving; the same command continues")
        if is_due or stops or self._at_end or self._may_fail_next():
            self.saving.save(self.curriculum.next_step, self.engine, self._state_dict)

    def _may_fail_next(self) -> bool:
        curriculum = self.curriculum
        return curriculum.at_boundary and self.plan.at_step(curriculum.next_step).phase.may_fail

    def _state_dict(self) -> dict[str, Any]:
        """Return everything that the run continues from, besides the tensors."""
        for callback in self.callbacks:
            callback.before_save(self)
        keys = state_keys(self.callbacks)
        return {
            "identity": self.identity,
            "curriculum": self.curriculum.state_dict(),
            "consumed_samples": self.consumed_samples,
            "skipped_steps": self.skipped_steps,
            "owes_evaluation": self.validation.is_owed,
            "callbacks": {key: one.state_dict() for key, one in zip(keys, self.callbacks, strict=True)},
        }

    def _report(self, report: StepReport) -> None:
        self._tell(lambda callback: callback.on_step_end(self, report))

    def _tell(self, event: Callable[[Callback], None]) -> None:
        with self.times.part("logging"):
            for callback in self.callbacks:
                event(callback)


def _say(text: str) -> None:
    if ranks.rank() == 0:
        print(text, flush=True)
