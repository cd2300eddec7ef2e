"""DeepSpeed's engine against plain autograd, and whole runs of it against the native engine's run of one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parity_matrix as matrix
import pytest
import torch.multiprocessing as mp

pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")

from megatron_lfr.cli import main
from megatron_lfr.parallel import session
from support import deepspeed_cases as cases
from support import deepspeed_memory
from support.close_runs import assert_close
from support.engine_errors import BOUNDS, Errors
from support.folder_bytes import folder_bytes

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples" / "deepspeed"
TP, SP = matrix.TP, matrix.SP
BF16_LOSS = 6e-4
"""Largest difference of a loss in bf16. Two layouts of the native engine differ by 1e-4."""


def example(name: str) -> list[str]:
    return ["--deepspeed", f"--deepspeed_config={EXAMPLES / name}.json"]


CHAIN = (
    (1, ["--exit-interval", "5"]),
    (2, ["--exit-interval", "10", "--async-save", "--recompute-granularity", "full", *example("zero3")]),
    (4, ["--exit-interval", "15", TP, "2", *example("zero1")]),
    (1, []),
)
"""One run: native, ZeRO-3 on two ranks, TP2 with ZeRO-1 on four, native again."""
HPZ = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
TWO_LAYERS = ["--num-layers", "2"]
GROWING = [
    *("--lfr-schedule", "[{kind: learn, duration: 1}]", "--lr-decay-style", "constant"),
    *("--micro-batch-size", "1", "--global-batch-size", "18", "--rampup-batch-size", "6", "6", "36"),
]
"""Steps of 6, 6, 6, 12, 12, 18, 18 and 4 blocks: two to six micro-batches on each of three ranks."""
EXTENDED = ["--train-iters", "10", "--lfr-schedule", "uniform", "--global-batch-size", "24"]
"""What a run of GROWING is after `extend`: two steps more."""
CLOSE = {
    "ZeRO-2": "tied",
    "TP2 DP2 SP, ZeRO-3, hpZ": "tied",
    "chain": "tied",
    "growing": "grown",
    "branch of ZeRO-2": "tied",
    "branch of growing": "grown",
}
"""Run → that of one process. ZeRO-2 is one on two ranks; hpZ on four, with selective recomputation, stopped once. The
branch of ZeRO-2 leaves it in a Focus, and goes on natively on one rank; that of growing, which was trained by ZeRO-3 on
three ranks, is extended, and goes on by ZeRO-2 on two."""


@dataclass(frozen=True)
class Results:
    """What the ranks have left."""

    folder: Path
    """The folders of all runs, by name."""
    native_bf16: list[float]

    def of_rank(self, rank: int, ranks: int = 2) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.folder / f"{rank} of {ranks}.json").read_text())
        return values


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Ranks are started once for each number of them: their imports take longer than most cases."""
    folder = tmp_path_factory.mktemp("deepspeed")
    prefixes = matrix.write_corpus(folder)

    def train_here(*runs: matrix.Case) -> None:
        matrix.run_here(runs, folder, prefixes)

    def start(ranks: int, *runs: matrix.Case, killed: matrix.Case | None = None) -> None:
        arguments = (ranks, str(folder), runs, killed, prefixes)
        mp.start_processes(cases.main, arguments, nprocs=ranks, start_method="forkserver")

    def branch(run: str, step: int) -> str:
        before, save = folder_bytes(folder / run), folder / f"branch of {run}"
        how = ["--at-step", str(step), "--lr-schedule", "inherit", "--save", str(save)]
        assert main(["branch", "--from", str(folder / run), *how]) == 0
        assert folder_bytes(folder / run) == before
        return save.name

    def extend(run: str) -> None:
        words = ["--train-iters", "+2", "--lfr-schedule", "uniform", "--global-batch-size", "24"]
        assert main(["extend", "--run", str(folder / run), *words]) == 0

    def case(name: str, ranks: int, *flags: str) -> matrix.Case:
        return matrix.Case(name, ranks, [*TWO_LAYERS, *flags])

    hpz = folder / "hpz.json"
    hpz.write_text(json.dumps({"zero_optimization": HPZ}))
    chain = [case("chain", ranks, *flags) for ranks, flags in CHAIN]
    grown = case("grown", 1, *GROWING, *EXTENDED)
    interrupted = case("growing", 3, *GROWING, "--exit-interval", "2", *example("zero3"))
    killed = case("growing", 3, *GROWING, "--save-interval", "2", "--async-save", *example("zero3_offload"))
    extended = case("growing", 2, *GROWING, *EXTENDED, *example("zero1"))
    of_four = ["--deepspeed", f"--deepspeed-config={hpz}", TP, "2", SP, "--recompute-granularity", "selective"]
    of_four_stopped = case("TP2 DP2 SP, ZeRO-3, hpZ", 4, *of_four, "--exit-interval", "12")

    train_here(case("tied", 1), chain[0], case("grown", 1, *GROWING))
    extend("grown")
    train_here(grown)
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):  # steps 3 to 6, of which the last two are lost
        start(3, interrupted, killed=killed)
    branched = branch("growing", 4)
    train_here(case("growing", 1, *GROWING))
    for run in ("growing", branched):
        extend(run)
    zero2 = case("ZeRO-2", 2, "--save-retain-steps", "10", *example("zero2"))
    start(2, zero2, extended, case(branched, 2, *GROWING, *EXTENDED, *example("zero2")), chain[1])
    train_here(case(branch("ZeRO-2", 10), 1))
    start(4, of_four_stopped, case(of_four_stopped.name, 4, *of_four), chain[2])
    train_here(chain[3])
    with session():
        return Results(folder, cases.bf16_losses(cases.native_bf16_engine()))


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, named in cases.CASES.items() for name in named])
def test_equals_the_oracle(ranks: int, name: str, results: Results) -> None:
    for rank in range(ranks):
        errors: Errors = results.of_rank(rank, ranks)["errors"][name]
        assert errors
        for quantity, error in errors.items():
            assert error <= BOUNDS.get(quantity.partition(" after")[0], 0.0), (rank, quantity, error)


@pytest.mark.parametrize("name", cases.BF16)
def test_bf16_equals_the_native_engine_in_bf16(name: str, results: Results) -> None:
    losses, errors = results.of_rank(0)["bf16"][name]
    assert len(losses) == 10
    assert losses == results.of_rank(1)["bf16"][name][0]
    assert max(abs(ours - theirs) for ours, theirs in zip(losses, results.native_bf16, strict=True)) <= BF16_LOSS
    assert not any(errors.values()), errors
    assert not any(results.of_rank(1)["bf16"][name][1].values())


@pytest.mark.parametrize("name", deepspeed_memory.CASES)
def test_memory_is_what_estimate_says(name: str, results: Results) -> None:
    for rank in range(2):
        measured = results.of_rank(rank)["memory"][name]
        assert measured == pytest.approx(deepspeed_memory.CASES[name].expected(), rel=0.1), rank


@pytest.mark.parametrize("name", CLOSE)
def test_a_run_equals_one_process(name: str, results: Results) -> None:
    assert len(matrix.read_steps(results.folder / name)) == (10 if "growing" in name else 25)
    assert_close(results.folder / name, results.folder / CLOSE[name])


def test_the_batch_grows(results: Results) -> None:
    events = [json.loads(line) for line in (results.folder / "growing" / "metrics.jsonl").read_text().splitlines()]
    consumed = [event["consumed_samples"] for event in events if event["event"] == "train"]
    assert np.diff(consumed, prepend=0).tolist() == [6, 6, 6, 12, 12, 18, 18, 4, 24, 24]


def test_the_killed_save_is_gone(results: Results) -> None:
    assert not list((results.folder / "growing" / "checkpoints").rglob("partial*"))


def test_its_run_is_evaluated_and_reported_as_any(results: Results, tmp_path: Path) -> None:
    means = []
    for name in ("ZeRO-2", "tied"):
        run, losses = results.folder / name, tmp_path / f"{name}.npy"
        assert main(["evaluate", "--run", str(run), "--split", "train", "--per-block", str(losses)]) == 0
        means.append(np.load(losses))
        assert main(["report", str(run), "--output", str(tmp_path / f"{name}.html")]) == 0
        assert (tmp_path / f"{name}.html").stat().st_size > 10_000
    assert len(means[0]) == 2 * matrix.BLOCKS_PER_DOMAIN
    np.testing.assert_allclose(means[0], means[1], rtol=0, atol=1e-5)


def test_no_score_is_near_a_threshold(results: Results) -> None:
    """Else rounding, which moves losses by less than 1e-5, could choose other blocks, and the same orders would be
    luck."""
    folder = results.folder
    prefixes = [str(path).removesuffix(".idx") for path in sorted(folder.glob("*.idx"))]
    gaps = matrix.threshold_gaps(folder / "tied", prefixes, TWO_LAYERS)
    assert len(gaps) == 2
    assert min(gaps) > 1e-3


def test_what_deepspeed_was_given_is_in_the_run_folder(results: Results) -> None:
    run = results.folder / "ZeRO-2"
    given = json.loads((run / "deepspeed.json").read_text())
    assert given["zero_optimization"]["stage"] == 2
    assert given["zero_optimization"]["reduce_bucket_size"] == 32 * 32  # auto
    assert given["train_micro_batch_size_per_gpu"] == 2
    assert given["gradient_clipping"] == 1.0
    assert (run / "deepspeed_config.json").read_text() == (EXAMPLES / "zero2.json").read_text()
