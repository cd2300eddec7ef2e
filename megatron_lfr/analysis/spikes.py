"""Steps whose loss or gradient norm stands out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.replay import Run
from megatron_lfr.output import is_number

Doubles = npt.NDArray[np.float64]

SPIKE = np.dtype(
    [("step", "<i8"), ("phase", "<i4"), ("what", "<U9"), ("value", "<f8"), ("median", "<f8"), ("deviations", "<f8")]
)
"""A step (counted from 1): its `what` (loss or grad_norm) is `deviations` standard deviations above the median."""

WINDOW = 51
"""Number of steps that the running median is taken over."""
FEWEST = 9
"""Number of values below which none is said to stand out from the median."""

_CHUNK = 1 << 16
_MAD_TO_DEVIATION = 1.4826
"""The standard deviation of a normal distribution, divided by its median absolute deviation."""


def find_spikes(run: Run, deviations: float) -> npt.NDArray[np.void]:
    """Find the steps that are more than `deviations` above the running median: records of type SPIKE, the worst first.

    The losses are those of all steps, from the journal: means over a step's blocks. Their median is taken over the
    WINDOW steps around a step, within its phase, as phases differ in difficulty; a short last step is allowed more.
    The gradient norms are those of the logged steps, from metrics.jsonl, which are few: their median crosses the
    boundaries of phases. The standard deviation is estimated from the median absolute deviation. Where there are fewer
    than FEWEST values, none stands out.
    """
    steps = run.steps()
    steps = steps[steps["blocks"] > 0]
    batches = np.array([planned.global_batch_size for planned in run.plan.phases])
    size = np.sqrt(steps["blocks"] / batches[steps["phase"]])
    by_phase = []
    for phase in np.unique(steps["phase"]):
        members = steps["phase"] == phase
        by_phase.append(_spikes("loss", steps[members], steps["nll"][members], size[members]))
    rows = [event for event in run.folder.events() if _has_norm(event)]
    logged = np.array([(row["step"], row["phase"]) for row in rows], [("step", "<i8"), ("phase", "<i4")])
    norms = np.array([row["grad_norm"] for row in rows], np.float64)
    spikes = np.concatenate([*by_phase, _spikes("grad_norm", logged, norms, np.ones(len(rows)))])
    spikes = spikes[spikes["deviations"] > deviations]
    return spikes[np.argsort(-spikes["deviations"], kind="stable")]


def running_median(values: Doubles) -> tuple[Doubles, Doubles]:
    """Return the median and the standard deviation (estimated from the median absolute deviation) of the WINDOW values
    around each value [n]; near an end, of the first or last WINDOW values."""
    n, width = len(values), min(WINDOW, len(values))
    median, deviation = np.empty(n), np.empty(n)
    if n == 0:
        return median, deviation
    first = np.clip(np.arange(n) - width // 2, 0, n - width)
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    for start in range(0, n, _CHUNK):
        part = slice(start, start + _CHUNK)
        around = windows[first[part]]
        median[part] = np.median(around, axis=1)
        deviation[part] = _MAD_TO_DEVIATION * np.median(np.abs(around - median[part, None]), axis=1)
    return median, deviation


def _spikes(what: str, steps: npt.NDArray[np.void], value: Doubles, size: Doubles) -> npt.NDArray[np.void]:
    """Return how far each step [n] is above the median: records of type SPIKE. Deviations are multiplied by `size` [n],
    which is below 1 for a step of fewer blocks."""
    if len(value) < FEWEST:
        return np.empty(0, SPIKE)
    median, deviation = running_median(value)
    deviation = np.maximum(deviation, 1e-6 * np.maximum(np.abs(median), 1.0))  # where all steps are alike
    spikes = np.empty(len(value), SPIKE)
    spikes["step"], spikes["phase"], spikes["what"] = steps["step"], steps["phase"], what
    spikes["value"], spikes["median"], spikes["deviations"] = value, median, (value - median) / deviation * size
    return spikes


def _has_norm(event: dict[str, Any]) -> bool:
    return event.get("event") == "train" and all(is_number(event.get(key)) for key in ("step", "phase", "grad_norm"))
