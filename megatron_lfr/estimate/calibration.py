"""Fits the planner's constants to what `megatron-lfr benchmark` has measured on the same device."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lfr.config.run import parse_settings
from megatron_lfr.estimate.layouts import layout_of, shape_for
from megatron_lfr.estimate.results import read_results
from megatron_lfr.estimate.step_time import CONSTANTS, Constants, Hardware, Layout, Shape, StepTime, step_time
from megatron_lfr.output import print_table
from megatron_lfr.parallel.devices import DEVICES, Device, device_key

FITTED = ("matrices", "attention", "memory", "network")
PRIOR, NOISE = 0.5, 0.05
"""Spreads of logarithms: of a constant before anything is measured; of what the model leaves unexplained of a time."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of a layout: seconds of a step, and of its parts."""

    shape: Shape
    layout: Layout
    hardware: Hardware
    seconds: dict[str, float]

    def predicted(self, constants: Constants) -> dict[str, float]:
        """Return the same seconds as the model gives them."""
        return _seconds(step_time(self.shape, self.layout, self.hardware, constants))


def _seconds(time: StepTime) -> dict[str, float]:
    computing = time.matrices + time.attention + time.memory + time.tensor
    return {"step": time.total, "forward and backward": computing, "optimizer": time.optimizer}


def read_measurements(paths: Sequence[Path], device: Device) -> list[Measurement]:
    """Read results of the benchmark, or of its sweeps. ValueError names --calibrate, the file and what is wrong."""
    rows = []
    for path in paths:
        for result in read_results(path, "--calibrate"):
            try:
                rows.append(_measurement(result, device))
            except (KeyError, TypeError, ArithmeticError):
                raise ValueError(f"--calibrate {path}: not a result of `megatron-lfr benchmark`") from None
            except ValueError as error:
                raise ValueError(f"--calibrate {path}: {error}") from None
    return rows


def _measurement(result: dict[str, Any], device: Device) -> Measurement:
    known = device_key(str(result["device"]))
    if known is not None and DEVICES[known] != device:
        raise ValueError(f"is of a {result['device']}; --gpu {known} is that")
    config = parse_settings(result["settings"], "its settings")
    model, ranks, hosts = config.model, int(result["ranks"]), [one["host"] for one in result["by_rank"]]
    if not 0 < ranks == len(hosts):
        raise ValueError("does not say on which hosts its ranks were (by_rank)")
    if config.deepspeed.deepspeed:
        raise ValueError("is of DeepSpeed's engine; the planner is about the native one")
    if not model.vocab_size:
        raise ValueError("does not say the vocabulary; measure with --vocab-size")
    model.validate(config.parallel.tensor_model_parallel_size)
    training = dataclasses.replace(
        config.training, global_batch_size=int(result["tokens_per_step"]) // config.data.seq_length
    )
    config = dataclasses.replace(config, training=training)
    config.parallel.validate(ranks)
    parts = result["parts"]
    seconds = {
        "step": statistics.median(result["step_seconds"]["all"]),
        "forward and backward": parts["forward"]["mean"] + parts["backward"]["mean"],
        "optimizer": parts["optimizer"]["mean"],
    }
    if not all(value > 0 for value in seconds.values()):
        raise ValueError("has a part that took no time")
    hardware = Hardware(device, max(map(hosts.count, hosts)))
    return Measurement(shape_for(config, model), layout_of(config, model, ranks), hardware, seconds)


def fit(measurements: Sequence[Measurement]) -> Constants:
    """Return the most probable constants: logarithms of times are measured with the spread NOISE, and logarithms of
    constants have the spread PRIOR around those of the published tables.

    So a constant that nothing measures keeps its value: the network's on one rank, say. Overlap is not fitted.
    """
    logs = np.zeros(len(FITTED))
    for _ in range(50):
        residuals, slopes = _residuals(measurements, logs), np.empty((3 * len(measurements) + len(FITTED), len(FITTED)))
        for index in range(len(FITTED)):
            moved = logs.copy()
            moved[index] += 1e-5
            slopes[:, index] = (_residuals(measurements, moved) - residuals) / 1e-5
        change = np.linalg.lstsq(slopes, -residuals)[0]  # Gauss-Newton
        logs += np.clip(change, -1, 1)
        if np.abs(change).max() < 1e-6:
            break
    return _constants(logs)


def _constants(logs: NDArray[np.float64]) -> Constants:
    factors = dict(zip(FITTED, np.exp(logs).tolist(), strict=True))
    return dataclasses.replace(
        CONSTANTS, **{name: getattr(CONSTANTS, name) * factor for name, factor in factors.items()}
    )


def _residuals(measurements: Sequence[Measurement], logs: NDArray[np.float64]) -> NDArray[np.float64]:
    constants = _constants(logs)
    errors = [
        np.log(predicted / one.seconds[name]) / NOISE
        for one in measurements
        for name, predicted in one.predicted(constants).items()
    ]
    return np.array([*errors, *(logs / PRIOR)])


def describe(measurements: Sequence[Measurement], constants: Constants) -> dict[str, Any]:
    """Return the constants, and each measured time beside what the model gave before and gives now, as plain values."""
    rows = [
        {"result": number, "of": name, "measured": seconds, "before": before[name], "fitted": fitted[name]}
        for number, one in enumerate(measurements, 1)
        for before, fitted in [(one.predicted(CONSTANTS), one.predicted(constants))]
        for name, seconds in one.seconds.items()
    ]
    return {"constants": vars(constants), "times": rows}


def print_calibration(calibration: dict[str, Any]) -> None:
    """Print the constants, and by how much predictions are off."""
    print("Constants: " + ", ".join(f"{name} {value:.3f}" for name, value in calibration["constants"].items()))
    rows = [
        [
            f"{row['result']} {row['of']}",
            f"{1000 * row['measured']:,.1f}",
            *(f"{100 * (row[when] / row['measured'] - 1):+.0f} %" for when in ("before", "fitted")),
        ]
        for row in calibration["times"]
    ]
    head = ["result", "measured ms", "predicted before", "predicted now"]
    print_table(head, rows, "Fitted to these results", left=head[:1])
