"""Writes metrics.jsonl: one JSON object for each logged step, evaluation and phase start; floats in full precision.

Everything that depends on the clock is under the key "time": two runs of the same command agree in everything else.
"""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_lfr.data.corpus.blocks import BlockSource
from megatron_lfr.fileio import json_value
from megatron_lfr.lfr.start import PhaseStart
from megatron_lfr.parallel import ranks
from megatron_lfr.run_folder.phase_row import describe_order
from megatron_lfr.training.callbacks import Callback, Training
from megatron_lfr.training.evaluation import Evaluation
from megatron_lfr.training.recording import StepReport


class MetricsFile(Callback):
    """Appends to metrics.jsonl. A checkpoint stores the file's length, and a resume cuts it back to that."""

    def __init__(self, path: Path, log_interval: int) -> None:
        self.path = path
        self.log_interval = log_interval
        self._window = Window()
        self._file = path.open("ab")

    def on_phase_start(self, trainer: Training, start: PhaseStart) -> None:
        planned, selection, source = start.planned, start.selection, trainer.train_source
        sizes = dict(zip(source.domains, np.diff(source.domain_starts).tolist(), strict=True))
        row: dict[str, Any] = {
            "event": "phase",
            "step": planned.first_step,
            "phase": planned.index,
            "kind": start.kind,
            **describe_order(planned, trainer.curriculum.order, sizes),
        }
        if selection is not None:
            left_out = selection.left_out(start.scores)
            in_scope = trainer.plan.in_scope(planned)
            row["dropped"] = selection.dropped
            row["dropped_share"] = selection.dropped_share
            if selection.dropped_hardest:
                row["dropped_hardest"] = selection.dropped_hardest
            row["unseen"] = selection.unseen
            row["left_out_by_domain"] = share_by_domain(source, left_out, in_scope)
        if start.verdict is not None:
            row["guard"] = start.verdict.as_dict()
        self._write(row, trainer, {})

    def on_step_end(self, trainer: Training, report: StepReport) -> None:
        self._window.add(report)
        if report.step % self.log_interval and report.step != trainer.plan.total_steps:
            return
        row = {
            "event": "train",
            "step": report.step,
            "phase": trainer.plan.at_step(report.step - 1).index,
            "consumed_samples": trainer.consumed_samples,
            "consumed_tokens": trainer.consumed_samples * trainer.plan.seq_length,
            "loss": self._window.mean_loss,
            "last_loss": None if report.skipped else json_value(report.loss),
            "grad_norm": None if report.skipped else json_value(report.grad_norm),
            "lr": report.lr,
            "skipped": trainer.skipped_steps,
        }
        self._write(row, trainer, self._window.times(trainer))
        self._window = Window()

    def on_evaluation(self, trainer: Training, evaluation: Evaluation) -> None:
        row = {
            "event": "evaluation",
            "step": evaluation.step,
            "phase": evaluation.phase,
            "loss": json_value(evaluation.loss),
            "tokens": evaluation.tokens,
            "domains": json_value(evaluation.domains),
        }
        self._write(row, trainer, {"seconds": evaluation.seconds})

    def before_save(self, trainer: Training) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def state_dict(self) -> dict[str, Any]:
        return {"bytes": self._file.tell(), "window": self._window.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        length = int(state.get("bytes", 0))
        assert self._file.tell() >= length  # find_start has checked it
        self._file.truncate(length)
        self._file.seek(length)
        if "window" in state:
            self._window = Window(**state["window"])

    def _write(self, row: dict[str, Any], trainer: Training, times: dict[str, float]) -> None:
        """Write a line. Its `parts` are the seconds of this process until now: its wall time since training began."""
        process = {"started": trainer.times.started, "parts": trainer.times.totals()}
        line = json.dumps({**row, "time": {**times, **process}}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()


class Window:
    """Sums over the steps since the last log entry."""

    def __init__(self, nll: float = 0.0, tokens: float = 0.0) -> None:
        self.nll = nll
        self.tokens = tokens
        self.steps = 0
        self.rows = 0
        self.seconds = 0.0
        self.wait = 0.0
        self.record = 0.0

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.rows += report.blocks.shape[1]
        self.seconds += report.seconds
        self.wait += report.wait_seconds
        self.record += report.record_seconds
        if not report.skipped:
            nll, tokens = report.blocks.sum(1, dtype="float64").tolist()
            self.nll += nll
            self.tokens += tokens

    @property
    def mean_loss(self) -> float | None:
        """Mean negative log-likelihood per token over the window; None where every step was skipped."""
        return self.nll / self.tokens if self.tokens else None

    def times(self, trainer: Training) -> dict[str, float]:
        """Return the mean milliseconds of a step, those of waiting for data and of recording losses, the speed, and the
        most memory so far on rank 0."""
        scale = 1000.0 / max(1, self.steps)
        tokens_per_second = self.rows * trainer.plan.seq_length / max(self.seconds, 1e-9)
        return {
            "step_ms": self.seconds * scale,
            "loader_wait_ms": self.wait * scale,
            "lfr_record_ms": self.record * scale,
            **speed(trainer, tokens_per_second),
            "peak_memory_bytes": peak_memory(trainer.engine.parallel.device),
        }

    def state(self) -> dict[str, float]:
        return {"nll": self.nll, "tokens": self.tokens}


def speed(trainer: Training, tokens_per_second: float) -> dict[str, float]:
    """Return the speed in tokens a second over all ranks, in 10^12 floating-point operations a second of each rank
    (a causal mask halves attention, recomputation does not count), and as share of the peak where that is known."""
    flops = tokens_per_second * trainer.engine.flops_per_token(trainer.plan.seq_length)
    tflops = flops / ranks.world_size() / 1e12
    figures = {"tokens_per_second": tokens_per_second, "tflops_per_gpu": tflops}
    return figures if trainer.peak_tflops is None else {**figures, "mfu": tflops / trainer.peak_tflops}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors have taken on this rank's GPU, or on a CPU the most that the process has had
    in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def share_by_domain(
    source: BlockSource, mask: npt.NDArray[np.bool_], in_scope: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Return the share of the blocks `in_scope` [num_blocks] that `mask` [num_blocks] marks, for each domain that has
    some."""
    bounds = zip(source.domains, source.domain_starts[:-1], source.domain_starts[1:], strict=True)
    parts = {name: mask[first:last][in_scope[first:last]] for name, first, last in bounds}
    return {name: float(part.mean()) for name, part in parts.items() if len(part)}
