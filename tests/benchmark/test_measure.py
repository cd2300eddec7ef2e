"""What a benchmark reports of two ranks, against what the layout says must be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from megatron_lfr.benchmark.parts import PARTS, STEP
from support import benchmark_cases as cases
from support.benchmark_cases import BATCH, HIDDEN, LAYERS, LENGTH, ROWS
from support.ports import free_port

Results = dict[str, dict[str, Any]]
MICRO_BATCHES = BATCH // ROWS
HIDDEN_BYTES = 4 * ROWS * LENGTH * HIDDEN


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("benchmark")
    port = free_port()
    mp.start_processes(cases.main, (port, str(folder)), nprocs=2, start_method="forkserver")
    results: Results = json.loads((folder / "results.json").read_text())
    return results


def calls(result: dict[str, Any], group: str, operation: str, size: int | None = None) -> int:
    """Return how often a group of this purpose does something in a step."""
    return sum(
        row["calls"]
        for row in result["collectives"]
        if group in row["group"].split("/") and row["operation"] == operation and size in (None, row["bytes"])
    )


@pytest.mark.parametrize("name", cases.CASES)
def test_the_parts_of_a_step_add_up_to_it(results: Results, name: str) -> None:
    parts = results[name]["parts"]
    for rank in results[name]["by_rank"]:
        assert sum(rank["parts"][part] for part in PARTS) == pytest.approx(rank["parts"][STEP])
        assert all(rank["parts"][part] >= 0 for part in PARTS)
    assert all(parts[part]["mean"] > 0 for part in ("forward", "backward", "gradient reduction", "optimizer"))
    assert (parts["waiting in the pipeline"]["mean"] > 0) == (name == "PP2")


@pytest.mark.parametrize("name", cases.CASES)
def test_the_speed_is_that_of_the_timed_steps(results: Results, name: str) -> None:
    result = results[name]
    assert result["tokens_per_step"] == BATCH * LENGTH
    times = result["step_seconds"]["all"]
    assert len(times) == 3
    seconds = BATCH * LENGTH * 3 / result["tokens_per_second"]
    assert seconds >= 0.5 * sum(times)
    causal, full = result["flops"]["causal"], result["flops"]["full attention"]
    # 12 x layers x heads x head size x keys: half of the square, and its diagonal
    assert full["flops_per_token"] - causal["flops_per_token"] == 12 * LAYERS * HIDDEN * (LENGTH - (LENGTH + 1) / 2)
    assert causal["tflops_per_rank"] == pytest.approx(
        result["tokens_per_second_per_rank"] * causal["flops_per_token"] / 1e12
    )


def test_collectives_of_tensor_parallelism(results: Results) -> None:
    """Shoeybi et al. 2019 (arXiv 1909.08053): two all-reduces a layer in the forward pass, two in the backward; one
    more each for the embedding and for the loss."""
    expected = (4 * LAYERS + 2) * MICRO_BATCHES
    assert calls(results["TP2"], "tensor", "all-reduce", HIDDEN_BYTES) == expected
    row = next(row for row in results["TP2"]["collectives"] if row["bytes"] == HIDDEN_BYTES)
    assert row["bus_gb_per_second"] == pytest.approx(HIDDEN_BYTES / row["seconds_alone"] / 1e9)  # 2 (n - 1) / n = 1


def test_compiled_layers_have_the_same_collectives(results: Results) -> None:
    eager, compiled = (
        [(row["group"], row["operation"], row["bytes"], row["calls"]) for row in results[name]["collectives"]]
        for name in ("TP2", cases.COMPILED)
    )
    assert compiled == eager


def test_collectives_of_a_pipeline(results: Results) -> None:
    """Activations one way and gradients the other, for each micro-batch."""
    for operation in ("send", "receive"):
        assert calls(results["PP2"], "pipeline", operation, HIDDEN_BYTES) == MICRO_BATCHES
    pipeline = results["PP2"]["pipeline"]
    assert pipeline["bubble_ideal"] == pytest.approx(1 / (MICRO_BATCHES + 1))
    assert 0 < pipeline["bubble_measured"] < 1
    assert results["TP2"]["pipeline"] is None


def test_collectives_of_a_sharded_optimizer(results: Results) -> None:
    """Every gradient is reduced once a step, in fp32, and every weight gathered."""
    for operation in ("reduce-scatter", "all-gather"):
        rows = [
            row
            for row in results["DP2 optim"]["collectives"]
            if row["operation"] == operation and "shard" in row["group"].split("/")
        ]
        moved = sum(row["calls"] * row["bytes"] for row in rows)
        assert 4 * results["DP2 optim"]["parameters"] <= moved <= 1.05 * 4 * results["DP2 optim"]["parameters"]


def test_every_step_sends_its_losses_and_asks_whether_to_stop(results: Results) -> None:
    for result in results.values():
        assert calls(result, "losses", "all-reduce", 2 * 4 * BATCH) == 1
        assert calls(result, "control", "all-reduce", 2 * 4) == 1


@pytest.mark.skipif(cases.DEEPSPEED not in cases.CASES, reason="deepspeed is not installed")
def test_deepspeed_reduces_every_gradient(results: Results) -> None:
    """Its ZeRO-2 sums gradients in fp32 after each micro-batch."""
    result = results[cases.DEEPSPEED]
    reduced = [row for row in result["collectives"] if row["operation"] in ("all-reduce", "reduce-scatter", "reduce")]
    moved = sum(row["calls"] * row["bytes"] for row in reduced)
    assert moved >= 4 * result["parameters"] * MICRO_BATCHES // 2


def test_a_slow_rank_shows(results: Results) -> None:
    fast, slow = (rank["parts"]["forward"] for rank in results[cases.SLOW]["by_rank"])
    passes = MICRO_BATCHES // 2  # of each of the two ranks
    assert slow > passes * cases.SECONDS
    assert slow - fast > 0.5 * passes * cases.SECONDS


def test_the_cost_of_choosing_blocks(results: Results) -> None:
    plain, rescored = results["TP2"]["lfr"], results[cases.SLOW]["lfr"]
    assert min(plain["recording_seconds"], plain["order_seconds"], rescored["rescoring_seconds"]) > 0
    assert plain["rescoring_seconds"] == 0
    assert len(plain["orders"]) == 5  # phases of the preset `lfr`
    assert plain["order_seconds"] * plain["steps_of_the_run"] == pytest.approx(
        sum(row["seconds"] for row in plain["orders"])
    )


def test_nothing_stays(tmp_path: Path) -> None:
    """One process, its files where it is told to put them."""
    result = cases.run([*cases.FLAGS, "--lfr-scratch-dir", str(tmp_path), "--peak-tflops", "2"])
    assert list(tmp_path.iterdir()) == []
    assert result["collectives"] == []
    causal = result["flops"]["causal"]
    assert causal["mfu"] == pytest.approx(causal["tflops_per_rank"] / 2)
    json.dumps(result, allow_nan=False)


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the run has 6 steps, of which the benchmark needs 7: fewer --steps"):
        cases.run([*cases.FLAGS, "--train-iters", "6"])
