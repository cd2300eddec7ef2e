"""Callbacks as a user would write them, which tests name with --callback."""

from __future__ import annotations

import os
import signal
from typing import Any, ClassVar

from megatron_lfr.lfr.start import PhaseStart
from megatron_lfr.training.callbacks import Callback, Training
from megatron_lfr.training.evaluation import Evaluation
from megatron_lfr.training.recording import StepReport


class KilledAfterStep17(Callback):
    """Kills its process once step 17 is recorded, as a machine that fails does."""

    def on_step_end(self, trainer: Training, report: StepReport) -> None:
        if report.step == 17:
            os.kill(os.getpid(), signal.SIGKILL)


class Events(Callback):
    """Notes every event, and counts steps over interruptions."""

    made: ClassVar[list[Events]] = []

    def __init__(self, weight: int = 1) -> None:
        self.weight, self.steps = weight, 0
        self.events: list[Any] = []
        self.made.append(self)

    def on_train_start(self, trainer: Training) -> None:
        self.events.append(("train start", trainer.curriculum.next_step))

    def on_train_end(self, trainer: Training) -> None:
        self.events.append(("train end", trainer.is_complete))

    def on_phase_start(self, trainer: Training, start: PhaseStart) -> None:
        self.events.append(("phase start", start.planned.index))

    def on_phase_end(self, trainer: Training, start: PhaseStart) -> None:
        self.events.append(("phase end", start.planned.index))

    def on_step_end(self, trainer: Training, report: StepReport) -> None:
        self.steps += self.weight
        self.events.append(report.step)

    def on_evaluation(self, trainer: Training, evaluation: Evaluation) -> None:
        self.events.append(("evaluation", evaluation.step))

    def before_save(self, trainer: Training) -> None:
        self.events.append(("save", trainer.curriculum.next_step))

    def on_error(self, trainer: Training, error: BaseException) -> None:
        self.events.append(("error", str(error)))
        raise RuntimeError("an error in telling of an error is not the one to tell")

    def close(self) -> None:
        self.events.append("close")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state.get("steps", 0)


class NeedsArgument(Callback):
    """Cannot be made by name alone."""

    def __init__(self, weight: int) -> None:
        self.weight = weight


class FailsWhenMade(Callback):
    """Finds something missing when it is made."""

    def __init__(self) -> None:
        raise OSError("no dashboard listens")


class FailsToClose(Events):
    """Hears of the end, and fails then."""

    def close(self) -> None:
        super().close()
        raise RuntimeError("cannot close")


class NoCallback:
    """Not what --callback takes."""
