"""The learning rate of a run: of the steps that are trained, from metrics.jsonl, and of those to come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.overview import RunView
from megatron_lfr.learning_rate import learning_rate_of
from megatron_lfr.lfr.main_path import MainPath
from megatron_lfr.output import is_number

_MOST_PLANNED = 4000
"""Steps to come, evenly spaced, whose rate is computed."""


@dataclass(frozen=True)
class Rates:
    """Learning rates by step, counted from 1. trained [logged steps]: of the steps in metrics.jsonl. planned: of the
    steps after the last of those, as the settings in force have it; empty where the run has ended."""

    trained_steps: npt.NDArray[np.int64]
    trained: npt.NDArray[np.float64]
    planned_steps: npt.NDArray[np.int64]
    planned: npt.NDArray[np.float64]


def rates(view: RunView) -> Rates:
    """Return the learning rates of a run. ValueError or TypeError where its settings are none of a learning rate."""
    rows = {row["step"]: float(row["lr"]) for row in view.event_rows("train") if is_number(row.get("lr"))}
    steps = np.array(sorted(rows), np.int64)
    trained = np.array([rows[step] for step in steps.tolist()], np.float64)
    settings, plan = view.run.config, view.run.plan
    last = end_step(view)
    done = int(steps[-1]) if len(steps) else 0
    if "lr" not in settings or done >= last:
        return Rates(steps, trained, np.empty(0, np.int64), np.empty(0))
    rate = learning_rate_of(settings, plan)
    ahead = np.unique(np.linspace(done + 1, last, min(last - done, _MOST_PLANNED)).astype(np.int64))
    return Rates(steps, trained, ahead, np.array([rate(step - 1) for step in ahead.tolist()], np.float64))


def end_step(view: RunView) -> int:
    """Return the run's last step: where the last version leaves a main path, else the plan's end. ValueError where the
    settings are none of a main path."""
    settings, total = view.run.config, view.run.plan.total_steps
    versions, share = settings.get("versions"), settings.get("branch_share")
    return total if versions is None or share is None else MainPath.of(total, versions, share).end
