"""What plugs into rank 0's loop. A callback sees every event of a run, and keeps its state across a resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_lfr.engine import StepOutput
from megatron_lfr.lfr.course import PhaseStart

if TYPE_CHECKING:
    from megatron_lfr.training.trainer import Trainer


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step, `step` counted from 1 as users read it."""

    step: int
    output: StepOutput
    lr: float
    seconds: float
    """The step's own wall time: waiting for its data, computing, recording its losses. Not what comes between steps."""
    wait_seconds: float
    """The part of it spent waiting for the loader."""
    record_seconds: float
    """The part of it spent recording losses."""


@dataclass(frozen=True)
class Evaluation:
    """Mean validation loss a token (nats), over everything and by domain."""

    step: int
    phase: int
    loss: float
    tokens: int
    domains: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Callback:
    """Base of all callbacks: every hook does nothing."""

    def on_phase_start(self, trainer: Trainer, start: PhaseStart) -> None:
        """A boundary was crossed and the phase's order made. Not called again when a run resumes inside a phase."""

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        """The step's losses are recorded."""

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """The model was evaluated on the validation split."""

    def before_checkpoint(self, trainer: Trainer) -> None:
        """A checkpoint is about to be written: bring to the disk what it refers to."""

    def on_end(self, trainer: Trainer) -> None:
        """The last phase is complete."""

    def close(self) -> None:
        """The process is about to leave the loop, whatever the reason."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave; {} where the run starts at step 0."""
