"""`estimate --plan --calibrate`: constants fitted to what the benchmark has measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from megatron_lfr.cli import main
from megatron_lfr.estimate.calibration import Measurement, fit
from megatron_lfr.estimate.step_time import CONSTANTS, Constants, Hardware, Layout, Shape
from megatron_lfr.parallel.devices import DEVICES

SHAPE = Shape(layers=22, hidden=2048, queries=2048, keys=256, ffn=5632, is_gated=True, vocabulary=32000)
LAYOUTS = [
    Layout(seq_length=2048, micro_batch=4, micro_batches=8),
    Layout(seq_length=16384, micro_batch=1, micro_batches=8),
    Layout(seq_length=2048, micro_batch=4, micro_batches=8, tensor=8, sequence_parallel=True),
    Layout(seq_length=2048, micro_batch=4, micro_batches=8, data=8, sharding="optim"),
]
FLAGS = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--ffn-hidden-size", "128"),
    *("--vocab-size", "256", "--seq-length", "64", "--global-batch-size", "8", "--bf16"),
]
PLAN = ["--plan", "--nodes", "1", "--gpus-per-node", "2", "--blocks", "1000", "--train-epochs", "1"]


def measured(constants: Constants, layouts: list[Layout]) -> list[Measurement]:
    """Return what a machine with these constants would measure, if the model were right."""
    hardware = Hardware(DEVICES["h100"], 8)
    rows = [Measurement(SHAPE, layout, hardware, {}) for layout in layouts]
    return [dataclasses.replace(row, seconds=row.predicted(constants)) for row in rows]


def test_the_constants_of_a_machine_come_out() -> None:
    machine = Constants(matrices=0.62, attention=0.4, memory=0.7, network=0.5, overlap=CONSTANTS.overlap)
    fitted = fit(measured(machine, LAYOUTS))
    for name, value in vars(machine).items():
        assert getattr(fitted, name) == pytest.approx(value, rel=0.05), name


def test_what_nothing_measures_keeps_its_value() -> None:
    machine = dataclasses.replace(CONSTANTS, memory=0.2, network=0.1)
    fitted = fit(measured(machine, LAYOUTS[:1]))
    assert fitted.network == pytest.approx(CONSTANTS.network, rel=1e-6)
    assert fitted.memory == pytest.approx(0.2, rel=0.05)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run a benchmark of this machine."""
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    steps = ["--steps", "4", "--warmup", "1", "--traced-steps", "2", "--json", str(path)]
    assert main(["benchmark", *FLAGS, "--micro-batch-size", "4", *steps]) == 0
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture
def device(tmp_path: Path) -> str:
    """Describe a device that is about as fast as a core."""
    rates = dict.fromkeys(("memory_gb", "memory_gb_per_second", "link_gb_per_second"), 50.0)
    path = tmp_path / "device.json"
    path.write_text(json.dumps({"bf16_tflops": 0.05, "network_gb_per_second": 1.0, **rates}))
    return str(path)


@pytest.mark.parametrize("is_sweep", [False, True])
def test_a_benchmark_calibrates_the_plan(
    is_sweep: bool, result: dict[str, Any], device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout that was measured is predicted nearer to its time than before; its plan says so."""
    path = tmp_path / "result.json"
    sweep = [{"state": "refused", "reason": "-"}, {"state": "measured", "result": result}]
    path.write_text(json.dumps({"format": 1, "sweep": sweep} if is_sweep else result))
    capsys.readouterr()
    flags = ["estimate", *PLAN, "--gpu", device, *FLAGS]
    assert main([*flags, "--calibrate", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    step = next(row for row in plan["calibration"]["times"] if row["of"] == "step")
    assert step["measured"] == statistics.median(result["step_seconds"]["all"])
    assert abs(step["fitted"] / step["measured"] - 1) < abs(step["before"] / step["measured"] - 1)
    assert main([*flags, "--json"]) == 0
    published = json.loads(capsys.readouterr().out)
    assert published["calibration"] is None
    assert published["best"][0]["step_seconds"] != plan["best"][0]["step_seconds"]
    assert main([*flags, "--calibrate", str(path)]) == 0
    assert "Fitted to these results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 7}, "not a result of `megatron-lfr benchmark`"),
        ({"settings": {}}, "does not say the vocabulary"),
        ({"settings": {"vocab_size": 100, "nonsense": 1}}, "unknown key 'nonsense'"),
        ({"device": "NVIDIA A100-SXM4-80GB"}, "is of a NVIDIA A100-SXM4-80GB; --gpu a100 is that"),
        ({"by_rank": []}, "on which hosts"),
        ({"by_rank": [3]}, "not a result"),
        ({"ranks": 0}, "on which hosts"),
        ({"parts": {"forward": {"mean": 0}, "backward": {"mean": 0}, "optimizer": {"mean": 1}}}, "took no time"),
    ],
)  # fmt: skip
def test_what_is_no_result_of_the_device_is_refused(
    change: dict[str, Any], message: str, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**result, **change}))
    assert main(["estimate", *PLAN, "--gpu", "h100", *FLAGS, "--calibrate", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"--calibrate {path}: " in error
    assert message in error


def test_it_goes_with_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *FLAGS, "--blocks", "1000", "--train-epochs", "1", "--calibrate", "x"]) == 2
    assert "--calibrate: goes with --plan" in capsys.readouterr().err
