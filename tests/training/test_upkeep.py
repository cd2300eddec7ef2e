"""Garbage that all ranks collect together, profiles of some steps, and what the logs say of speed and memory."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import json
import re
from pathlib import Path

import pytest

from megatron_lfr.cli import main
from megatron_lfr.config.training import LoggingConfig, TrainingConfig
from megatron_lfr.parallel import ranks
from megatron_lfr.training import upkeep
from megatron_lfr.training.upkeep import collecting_together, profiling


@pytest.fixture
def short_args(tiny_args: list[str]) -> list[str]:
    """Return the flags of a run of 8 steps."""
    at = tiny_args.index("--train-epochs")
    return [*tiny_args[:at], *tiny_args[at + 2 :], "--train-iters", "8", "--lfr-schedule", "uniform"]


def test_garbage_is_collected_after_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[str] = []
    monkeypatch.setattr(upkeep.gc, "collect", lambda: collected.append("now"))
    monkeypatch.setattr(ranks, "world_size", lambda group=None: 2)
    counts = []
    with collecting_together(TrainingConfig(manual_gc_interval=3)) as after_step:
        assert not gc.isenabled()
        for done in range(1, 8):
            after_step(done)
            counts.append(len(collected))
    assert counts == [1, 1, 2, 2, 2, 3, 3]  # once at the start
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(("config", "size"), [(TrainingConfig(), 1), (TrainingConfig(manual_gc=False), 2)])
def test_garbage_is_left_to_python(monkeypatch: pytest.MonkeyPatch, config: TrainingConfig, size: int) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda group=None: size)
    with collecting_together(config) as after_step:
        assert gc.isenabled()
        after_step(100)


def test_a_profile_of_some_steps(short_args: list[str], tmp_path: Path) -> None:
    """Its trace has the parts of two steps of two micro-batches, by name."""
    profiled = ["--profile", "--profile-step-start", "3", "--profile-step-end", "5"]
    assert main(["train", *short_args, *profiled]) == 0
    (path,) = (tmp_path / "run" / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert names.count("all micro-batches") == 2
    assert names.count("forward") == names.count("backward") == 4
    assert names.count("optimizer") == 2


def test_a_profile_goes_to_the_ranks_that_are_named(tmp_path: Path) -> None:
    config = LoggingConfig(profile=True, profile_ranks=[1])
    with profiling(config, tmp_path / "profile", 0) as after_step:
        for done in range(1, 20):
            after_step(done)
    assert not (tmp_path / "profile").exists()
    for start, end in ((5, 5), (-1, 2)):
        with pytest.raises(ValueError, match=r"^--profile-step-start"):
            dataclasses.replace(config, profile_step_start=start, profile_step_end=end).validate()


def test_a_profile_of_a_run_that_ends_first_is_written(tmp_path: Path) -> None:
    config = LoggingConfig(profile=True, profile_step_start=2, profile_step_end=9)
    with profiling(config, tmp_path / "profile", 4) as after_step:  # a resumed run, inside of the steps
        after_step(5)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_0.json.gz"]


def test_speed_and_memory_in_the_logs(
    short_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *short_args, "--peak-tflops", "0.5"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " iteration " in line]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows if row["event"] == "train"]
    assert len(lines) == len(times) == 2
    for line, time in zip(lines, times, strict=True):
        assert time["mfu"] == pytest.approx(time["tflops_per_gpu"] / 0.5)
        shown = re.search(
            r"waiting for data \(ms\): ([\d.]+) .* MFU: ([\d.]+) % \| peak memory \(GB\): ([\d.]+) ", line
        )
        assert shown is not None
        assert float(shown[1]) == pytest.approx(time["loader_wait_ms"], abs=0.06)
        assert float(shown[2]) == pytest.approx(100 * time["mfu"], abs=0.06)
        assert float(shown[3]) == pytest.approx(time["peak_memory_bytes"] / 1e9, abs=0.006)
        assert 5e7 < time["peak_memory_bytes"] < 1e11
