"""What plugs into rank 0's loop. A callback hears of the events of a run, and keeps its state across a resume."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_lfr.data.corpus.blocks import BlockSource
from megatron_lfr.engine import Engine
from megatron_lfr.lfr import BaseCurriculum, Plan
from megatron_lfr.lfr.base import PhaseStart
from megatron_lfr.training.evaluation import Evaluation
from megatron_lfr.training.recording import StepReport
from megatron_lfr.training.times import Stopwatch


class Training(Protocol):
    """What a callback may look at: the trainer."""

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
    def consumed_samples(self) -> int:
        """Blocks of all recorded steps."""
        ...

    @property
    def skipped_steps(self) -> int:
        """Steps that left the weights alone because they were not finite."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the last phase is complete and evaluated."""
        ...


class Callback:
    """Base of all callbacks: every event does nothing."""

    def on_train_start(self, trainer: Training) -> None:
        """The process is about to train, or has nothing left to do; states are loaded."""

    def on_train_end(self, trainer: Training) -> None:
        """Training has ended in order, and its last checkpoint is on the disk. It was stopped by a signal or a limit
        where it is not complete."""

    def on_phase_start(self, trainer: Training, start: PhaseStart) -> None:
        """A boundary was crossed and the phase's order made. Not called again when a run resumes inside a phase."""

    def on_phase_end(self, trainer: Training, start: PhaseStart) -> None:
        """The phase's last step is recorded and the model evaluated. Where a stop has cut that evaluation short, the
        process that makes up for it calls this, and a checkpoint holds the step already."""

    def on_step_end(self, trainer: Training, report: StepReport) -> None:
        """The step's losses are recorded. The next step may be under way."""

    def on_evaluation(self, trainer: Training, evaluation: Evaluation) -> None:
        """The model was evaluated on the validation split."""

    def before_save(self, trainer: Training) -> None:
        """A checkpoint is about to be written: bring to the disk what it refers to."""

    def on_error(self, trainer: Training, error: BaseException) -> None:
        """An error is about to end the process. What is raised here is not told."""

    def close(self) -> None:
        """The process is about to leave the loop, whatever the reason."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave; {} where the run starts at step 0, or had no such callback."""


def state_keys(callbacks: Sequence[Callback]) -> list[str]:
    """The names of the callbacks' states in a checkpoint: their classes' names, those of further callbacks of one name
    with a number."""
    seen: Counter[str] = Counter()
    keys = []
    for callback in callbacks:
        name = type(callback).__name__
        seen[name] += 1
        keys.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return keys


def callback_class(name: str) -> type[Callback]:
    """The class that --callback names as `package.module:Name`, which can be made without arguments. ValueError says
    what is wrong with it."""
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
