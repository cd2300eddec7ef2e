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
"""A step (counted from 1) whose `what` (loss or grad_norm) is `deviations` above the running median."""

WINDOW = 51
"""Steps of the running median."""
FEWEST = 9
"""Values that a median needs, to say that one of them stands out."""

_CHUNK = 1 << 16
_MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution, its standard deviation over its median absolute deviation."""


def find_spikes(run: Run, deviations: float) -> npt.NDArray[np.void]:
    """Records of type SPIKE, the worst first.

    Losses are those of all steps, from the journal: means over a step's blocks. The median is that of the WINDOW steps
    around, within the phase, as phases differ in difficulty; a short last step is allowed more. Gradient norms are
    those of the logged steps, from metrics.jsonl, which are few: the median goes over the phases' bounds. The deviation
    is the median absolute one, scaled. Of fewer than FEWEST values, none stands out.
    """
    steps = run.steps()
    steps = steps[steps["blocks"] > 0]
    size = np.sqrt(steps["blocks"] / run.plan.global_batch_size)
    found = []
    for phase in np.unique(steps["phase"]):
        own = steps["phase"] == phase
        found.append(_spikes("loss", steps[own], steps["nll"][own], size[own]))
    rows = [event for event in run.folder.events() if _has_norm(event)]
    logged = np.array([(row["step"], row["phase"]) for row in rows], [("step", "<i8"), ("phase", "<i4")])
    norms = np.array([row["grad_norm"] for row in rows], np.float64)
    spikes = np.concatenate([*found, _spikes("grad_norm", logged, norms, np.ones(len(rows)))])
    spikes = spikes[spikes["deviations"] > deviations]
    return spikes[np.argsort(-spikes["deviations"], kind="stable")]


def running_median(values: Doubles) -> tuple[Doubles, Doubles]:
    """(median, standard deviation estimated from the median absolute deviation) of the WINDOW values around each [n];
    near an end, of the WINDOW values there."""
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
    """How far each step [n] stands out, records of type SPIKE; `size` is 1 where it may do so by one deviation."""
    if len(value) < FEWEST:
        return np.empty(0, SPIKE)
    median, deviation = running_median(value)
    deviation = np.maximum(deviation, 1e-6 * np.maximum(np.abs(median), 1.0))  # where all steps are alike
    found = np.empty(len(value), SPIKE)
    found["step"], found["phase"], found["what"] = steps["step"], steps["phase"], what
    found["value"], found["median"], found["deviations"] = value, median, (value - median) / deviation * size
    return found


def _has_norm(event: dict[str, Any]) -> bool:
    return event.get("event") == "train" and all(is_number(event.get(key)) for key in ("step", "phase", "grad_norm"))
