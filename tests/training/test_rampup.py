"""--rampup-batch-size: batch sizes that grow, as segments."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.analysis import open_run
from megatron_lfr.cli import main
from megatron_lfr.config import RunConfig
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.lfr import Blend
from megatron_lfr.planning import rampup_plan
from support.same_run import assert_same_run, metrics_without_time
from support.tiny_run import STOPPED, tiny_flags
from support.two_ranks import train_two_ranks

RAMP = ["--rampup-batch-size", "4", "4", "16", "--global-batch-size", "12"]
CONSUMED = [4, 8, 16, 28, 40, 52]


def flags(corpus: list[str]) -> list[str]:
    words = tiny_flags(corpus)
    at = words.index("--train-epochs")
    rate = ["--lr-decay-style", "constant", "--lr-warmup-samples", "20"]
    length = ["--lfr-schedule", "uniform", "--train-samples", "52", "--log-interval", "1"]
    return [*words[:at], *words[at + 2 :], *length, *rate, *RAMP]


@given(
    start=st.integers(1, 9),
    increment=st.integers(1, 5),
    increments=st.integers(1, 6),
    samples=st.integers(1, 400),
)
def test_batch_sizes_are_megatrons(start: int, increment: int, increments: int, samples: int) -> None:
    end = start + increment * increments
    training = replace(
        RunConfig().training, global_batch_size=end, rampup_batch_size=[start, increment, samples], micro_batch_size=1
    )
    plan = rampup_plan(replace(RunConfig(), training=training), Blend([0, 50]))
    expected, consumed = [], 0
    while (size := start + consumed * increments // samples * increment) < end:
        expected.append(size)
        consumed += size
    assert plan is not None
    assert [plan.at_step(step).global_batch_size for step in range(plan.total_steps)] == expected
    assert plan.total_samples == consumed
    assert [p.earlier for p in plan.phases] == [plan.samples_before(p.first_step) for p in plan.phases]


def test_the_ramp_is_weighed_as_the_preset_is(corpus: list[str], tmp_path: Path) -> None:
    """0 leaves a block out, from the first step on."""
    blocks = BlockDataset(corpus, 16, "1").train.num_blocks
    weight = np.ones(blocks, np.float32)
    weight[::3] = 0
    np.save(tmp_path / "w.npy", weight)
    words = [*flags(corpus), "--split", "1", "--lfr-scores", f"weight={tmp_path / 'w.npy'}"]
    assert main(["train", *words, "--save", str(tmp_path / "run")]) == 0
    run = open_run(tmp_path / "run")
    assert len(run.plan.segments) == 3
    for history in run.phases():
        assert (weight[history.block_ids] > 0).all()


def test_an_extension_has_a_batch_size_that_the_ramp_leads_to(
    ramped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run keeps its --rampup-batch-size, which no other size would go with."""
    run = shutil.copytree(ramped, tmp_path / "run")
    more = ["--run", str(run), "--train-samples", "+16", "--lfr-schedule", "uniform"]
    assert main(["extend", *more, "--global-batch-size", "4"]) == 2
    printed = capsys.readouterr().err
    assert "error: --global-batch-size 4: the run keeps its --rampup-batch-size" in printed
    assert "some times INCREMENT make --global-batch-size 4" in printed
    assert main(["extend", *more, "--global-batch-size", "16"]) == 0
    code = main(["train", "--config", str(run / "config.yaml"), "--save", str(run)])
    assert code == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def ramped(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run whose batch size grows. Not to be written to."""
    folder = tmp_path_factory.mktemp("ramped") / "run"
    assert main(["train", *flags(corpus), "--save", str(folder)]) == 0
    return folder


def test_the_rate_follows_the_samples(ramped: Path, corpus: list[str]) -> None:
    rows = [row for row in metrics_without_time(ramped) if row["event"] == "train"]
    assert [row["consumed_samples"] for row in rows] == CONSUMED
    np.testing.assert_allclose([row["lr"] for row in rows], [0.01 * min(1, done / 20) for done in CONSUMED])
    assert main(["train", *flags(corpus), "--save", str(ramped), "--rampup-batch-size", "4", "8", "16"]) == 2
    assert main(["inspect", str(ramped), "--step", "5"]) == 0


def test_a_stop_inside_the_ramp_changes_nothing(ramped: Path, corpus: list[str], tmp_path: Path) -> None:
    words = [*flags(corpus), "--save", str(tmp_path / "run"), "--exit-interval"]
    for stop in ("2", "5"):
        assert main(["train", *words, stop]) == STOPPED
    assert main(["train", *words, "None"]) == 0
    assert_same_run(ramped, tmp_path / "run")


def test_a_pipeline_takes_any_number_of_micro_batches(ramped: Path, corpus: list[str], tmp_path: Path) -> None:
    words = [*flags(corpus), "--micro-batch-size", "2", "--pipeline-model-parallel-size", "2"]
    words += ["--save", str(tmp_path / "run")]
    train_two_ranks(words, tmp_path / "printed")
    one, two = ([row for row in metrics_without_time(run) if "loss" in row] for run in (ramped, tmp_path / "run"))
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-4)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ("4 4", "give START INCREMENT SAMPLES"),
        ("4 3 16", "give START INCREMENT SAMPLES"),
        ("12 4 16", "give START INCREMENT SAMPLES"),
        ("2 2 16", "must be multiples of --micro-batch-size 4"),
        ("4 4 60", "--train-samples 52: must be more than the"),
    ],
)
def test_ramps_that_cannot_be(
    ramp: str, message: str, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags(corpus), "--rampup-batch-size", *ramp.split(), "--save", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_lengths_in_steps_and_in_samples_do_not_mix(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags(corpus), "--lr-decay-iters", "9", "--save", str(tmp_path / "run")]) == 2
    assert "--lr-warmup-samples and --lr-decay-iters: the batch size changes" in capsys.readouterr().err
