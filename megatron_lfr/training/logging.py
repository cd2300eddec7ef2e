"""Shows a run while it trains: a progress bar or Megatron's console line, TensorBoard, Weights & Biases."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_lfr.lfr.start import PhaseStart
from megatron_lfr.training.callbacks import Callback, Training
from megatron_lfr.training.evaluation import Evaluation
from megatron_lfr.training.metrics import Window, peak_memory, speed
from megatron_lfr.training.recording import StepReport


def phase_title(start: PhaseStart) -> str:
    """Describe a phase that begins in one line."""
    planned, selection = start.planned, start.selection
    title = f"phase {planned.index} {planned.phase.kind}: {planned.samples} blocks in {planned.steps} steps"
    if selection is not None:
        scored = max(1, selection.n_blocks - selection.unseen)
        hardest = 100 * selection.dropped_hardest / scored
        title += f", without the easiest {100 * selection.dropped_share - hardest:.1f} % "
        title += f"and the hardest {hardest:.1f} % " if hardest else ""
        title += "of the scored blocks"
        if selection.unseen:
            title += f", {selection.unseen} unseen {'excluded' if selection.excludes_unseen else 'kept'}"
    if planned.phase.counting:
        title += f", {planned.phase.counting}"
    if start.verdict is not None:
        title += f"; {start.verdict}"
    return title


def evaluation_title(evaluation: Evaluation) -> str:
    """Describe an evaluation in one line."""
    domains = "".join(f" | {name}: {loss:.4f}" for name, loss in evaluation.domains.items())
    return f"validation at step {evaluation.step} | loss: {evaluation.loss:.4f}{domains}"


class MegatronLines(Callback):
    """Prints Megatron's console line every `log_interval` steps, if the output is no terminal; tools can parse it."""

    def __init__(self, log_interval: int) -> None:
        self.log_interval = log_interval
        self._window = Window()

    def on_phase_start(self, trainer: Training, start: PhaseStart) -> None:
        print(f" {phase_title(start)}", flush=True)

    def on_evaluation(self, trainer: Training, evaluation: Evaluation) -> None:
        print(f" {evaluation_title(evaluation)}", flush=True)

    def on_step_end(self, trainer: Training, report: StepReport) -> None:
        self._window.add(report)
        if report.step % self.log_interval and report.step != trainer.plan.total_steps:
            return
        window, self._window = self._window, Window()
        times = window.times(trainer)
        loss = float("nan") if window.mean_loss is None else window.mean_loss
        utilisation = f" MFU: {100 * times['mfu']:.1f} % |" if "mfu" in times else ""
        print(
            f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {report.step:8d}/{trainer.plan.total_steps:8d} |"
            f" consumed samples: {trainer.consumed_samples:12d} |"
            f" elapsed time per iteration (ms): {times['step_ms']:.1f} |"
            f" waiting for data (ms): {times['loader_wait_ms']:.1f} |"
            f" throughput per GPU (TFLOP/s/GPU): {times['tflops_per_gpu']:.3f} |"
            f"{utilisation}"
            f" peak memory (GB): {times['peak_memory_bytes'] / 1e9:.2f} |"
            f" learning rate: {report.lr:.6E} |"
            f" global batch size: {report.blocks.shape[1]:5d} |"
            f" lm loss: {loss:.6E} |"
            f" grad norm: {report.grad_norm:.3f} |"
            f" number of skipped iterations: {trainer.skipped_steps:3d} |",
            flush=True,
        )


_WIDE = 80
"""Number of columns that a terminal needs to show the bar, the speed and the times."""


class ProgressBar(Callback):
    """Shows a live bar with the phase, the loss and the speed, on a terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)
        columns = [
            TextColumn("[bold]{task.description}"),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]:.3f}"),
        ]
        wide = [
            BarColumn(bar_width=None),
            TextColumn("{task.fields[speed]:,.0f} tok/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        self._progress = Progress(
            *columns,
            *(wide if self._console.width >= _WIDE else []),
            console=self._console,
        )
        self._task: Any = None

    def on_phase_start(self, trainer: Training, start: PhaseStart) -> None:
        self._console.print(phase_title(start))

    def on_evaluation(self, trainer: Training, evaluation: Evaluation) -> None:
        self._console.print(evaluation_title(evaluation))

    def on_step_end(self, trainer: Training, report: StepReport) -> None:
        if self._task is None:
            self._progress.start()
            total = trainer.plan.total_steps
            self._task = self._progress.add_task("", total=total, loss=float("nan"), speed=0.0)
        tokens = report.blocks.shape[1] * trainer.plan.seq_length
        self._progress.update(
            self._task,
            completed=report.step,
            description="" if trainer.curriculum.current is None else trainer.curriculum.current.kind,
            loss=report.loss,
            speed=tokens / report.seconds,
        )

    def on_train_end(self, trainer: Training) -> None:
        self._progress.stop()  # what others print at the end needs no bar below it

    def close(self) -> None:
        self._progress.stop()


class TensorBoard(Callback):
    """Writes scalars for TensorBoard; on a resume, points after the checkpoint are purged."""

    def __init__(self, folder: Path, log_interval: int) -> None:
        self.folder = folder
        self.log_interval = log_interval
        self._writer: Any = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._purge_step = state.get("step", 0) + 1

    def before_save(self, trainer: Training) -> None:
        self._step = trainer.curriculum.next_step
        if self._writer is not None:
            self._writer.flush()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def on_step_end(self, trainer: Training, report: StepReport) -> None:
        if report.step % self.log_interval == 0 or report.step == trainer.plan.total_steps:
            self._write(step_scalars(trainer, report), report.step)

    def on_evaluation(self, trainer: Training, evaluation: Evaluation) -> None:
        self._write(evaluation_scalars(evaluation), evaluation.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        if self._writer is None:  # a run that writes no scalar leaves no file
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.folder, purge_step=self._purge_step)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)


class WeightsAndBiases(Callback):
    """Sends the same scalars to Weights & Biases; a run that resumes continues its run there."""

    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any], log_interval: int) -> None:
        self.log_interval = log_interval
        self._settings = {"project": project, "name": name or None, "dir": str(folder), "config": config}
        self._run: Any = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        import wandb

        # Settings of the optimizer may change on resume: W&B would refuse them.
        self._run = wandb.init(**self._settings, id=state.get("id"), resume="allow", allow_val_change=True)

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._run.id}

    def on_step_end(self, trainer: Training, report: StepReport) -> None:
        if report.step % self.log_interval == 0 or report.step == trainer.plan.total_steps:
            self._run.log(step_scalars(trainer, report), step=report.step)

    def on_evaluation(self, trainer: Training, evaluation: Evaluation) -> None:
        self._run.log(evaluation_scalars(evaluation), step=evaluation.step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def step_scalars(trainer: Training, report: StepReport) -> dict[str, float]:
    """Return the scalars of one step by their dashboard names."""
    tokens = report.blocks.shape[1] * trainer.plan.seq_length
    return {
        "train/loss": report.loss,
        "train/grad_norm": report.grad_norm,
        "train/learning_rate": report.lr,
        "train/skipped_steps": trainer.skipped_steps,
        "train/phase": trainer.plan.at_step(report.step - 1).index,
        "time/step_ms": 1000 * report.seconds,
        "time/loader_wait_ms": 1000 * report.wait_seconds,
        **{f"time/{name}": value for name, value in speed(trainer, tokens / max(report.seconds, 1e-9)).items()},
        "memory/peak_gb": peak_memory(trainer.engine.parallel.device) / 1e9,
    }


def evaluation_scalars(evaluation: Evaluation) -> dict[str, float]:
    """Return the scalars of an evaluation by their dashboard names."""
    by_domain = {f"validation/{name}": loss for name, loss in evaluation.domains.items()}
    return {"validation/loss": evaluation.loss, **by_domain}


def console(log_interval: int) -> Callback:
    """Make the progress bar if the output is a terminal, or Megatron's lines otherwise."""
    return ProgressBar() if sys.stdout.isatty() else MegatronLines(log_interval)
