"""Callbacks plug into the loop on rank 0: events of a run call them, and they keep their state across a resume."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_lfr.data.corpus.blocks import BlockSource
from megatron_lfr.engine import Engine
from megatron_lfr.lfr import BaseCurriculum, Plan
from megatron_lfr.lfr.start import PhaseStart
from megatron_lfr.training.evaluation import Evaluation
from megatron_lfr.training.recording import StepReport
from megatron_lfr.training.times import Stopwatch


class Training(Protocol):
    """What a callback may read from the trainer."""

    @property
    def engine(self) -> Engine: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def curriculum(self) -> BaseCurriculum: ...
    @property
    def train_source(self) -> BlockSource: ...
    @property
    def times(self) -> Stopwatch: ...

    @property
    def peak_tflops(self) -> float | None:
        """What one device computes at most, in 10^12 operations a second; None where it is not known."""
        ...

    @property
    def consumed_samples(self) -> int:
        """Number of samples of all recorded steps."""
        ...

    @property
    def skipped_steps(self) -> int:
        """Number of steps that changed no weights because their loss or gradient was not finite."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the run's last step is recorded, and the model evaluated there."""
        ...


class Callback:
    """Base class of all callbacks. Its methods do nothing."""

    def on_train_start(self, trainer: Training) -> None:
        """Called when the process is about to train, or has nothing left to do; states are loaded."""

    def on_train_end(self, trainer: Training) -> None:
        """Called when training has ended without an error, and its last checkpoint is on disk. If training is not
        complete, a signal or a limit stopped it."""

    def on_phase_start(self, trainer: Training, start: PhaseStart) -> None:
        """Called when a phase has begun and its order is made, but not again when a run resumes inside a phase."""

    def on_phase_end(self, trainer: Training, start: PhaseStart) -> None:
        """Called when a phase's last step is recorded and the model evaluated. Where a stop has cut that evaluation
        short, the process that makes up for it calls this, and a checkpoint holds the step already."""

    def on_step_end(self, trainer: Training, report: StepReport) -> None:
        """Called when a step's losses are recorded. The next step may already be under way."""

    def on_evaluation(self, trainer: Training, evaluation: Evaluation) -> None:
        """Called when the model has been evaluated on the validation split."""

    def before_save(self, trainer: Training) -> None:
        """Called when a checkpoint is about to be written: make sure that what it refers to is on disk."""

    def on_error(self, trainer: Training, error: BaseException) -> None:
        """Called when an error is about to end the process. Errors that are raised here are dropped."""

    def close(self) -> None:
        """Called when the process is about to leave the loop, for whatever reason."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, which JSON can hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; {} where the run starts at step 0, or had no such callback."""


def state_keys(callbacks: Sequence[Callback]) -> list[str]:
    """Return the names of the callbacks' states in a checkpoint: the names of their classes; further callbacks of the
    same name get a number."""
    seen: Counter[str] = Counter()
    keys = []
    for callback in callbacks:
        name = type(callback).__name__
        seen[name] += 1
        keys.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return keys


def callback_class(name: str) -> type[Callback]:
    """Import the class that --callback names as `package.module:Name`, which must be constructible without arguments.
    ValueError says what is wrong with the name."""
    module, _, attribute = name.partition(":")
    if not module or not attribute or module.startswith("."):
        raise ValueError(f"--callback {name}: expected package.module:Name")
    try:
        chosen = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"--callback {name}: {error}; is its folder in PYTHONPATH?") from error
    except SyntaxError as error:
        raise ValueError(f"--callback {name}: {error}") from error
    except AttributeError:
        raise ValueError(f"--callback {name}: {module} has no {attribute}") from None
    if not (isinstance(chosen, type) and issubclass(chosen, Callback)):
        raise ValueError(f"--callback {name}: must be a class derived from megatron_lfr.training.callbacks.Callback")
    try:
        inspect.signature(chosen).bind()
    except TypeError as error:
        raise ValueError(f"--callback {name}: is made without arguments, but {error}") from None
    return chosen
