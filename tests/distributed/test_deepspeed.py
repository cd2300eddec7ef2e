"""DeepSpeed's engine against plain autograd, and whole runs of it against the native engine's run of one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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
from support.engine_cases import BOUNDS, Errors

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples" / "deepspeed"
TP, SP = matrix.TP, matrix.SP
BF16_LOSS = 6e-4
"""Largest difference of a loss in bf16. Two layouts of the native engine differ by 1e-4."""


def example(name: str) -> list[str]:
    return ["--deepspeed", f"--deepspeed_config={EXAMPLES / name}.json"]


RUNS: dict[str, tuple[int, str, list[str]]] = {
    "ZeRO-2": (2, "tied", example("zero2")),
    "ZeRO-3": (2, "tied, full recomputation", example("zero3")),
    "killed": (2, "tied", ["--save-interval", "4", "--async-save", *example("zero3_offload")]),
    "branch, TP2 SP, ZeRO-1": (2, "untied", [TP, "2", SP, *example("zero1")]),
    "TP2 DP2 SP, ZeRO-3": (4, "untied, selective recomputation", [TP, "2", SP, *example("zero3")]),
}
"""Name → (ranks, variant, flags). One has begun before, and was killed in a save; one goes on from the native engine's
run of its variant."""
CUT = 10
"""Step that branches go on from, in the first Focus."""
RETAINED = ["--save-retain-steps", str(CUT)]
CHAIN = (
    (1, ["--exit-interval", "5"]),
    (2, ["--exit-interval", "10", "--async-save", *example("zero3")]),
    (4, ["--exit-interval", "15", TP, "2", *example("zero1")]),
    (1, []),
)
"""One run: native, ZeRO-3 on two ranks, TP2 with ZeRO-1 on four, native again."""


@dataclass(frozen=True)
class Results:
    """What the ranks have left."""

    folder: Path
    """The folders of all runs, by name; of the references by variant."""
    native_bf16: list[float]


def branch(parent: Path, save: Path) -> None:
    words = ["--from", str(parent), "--at-step", str(CUT), "--save", str(save)]
    assert main(["branch", *words, "--lr-schedule", "inherit"]) == 0


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Ranks are started once for each number of them: their imports take longer than most cases."""
    folder = tmp_path_factory.mktemp("deepspeed")
    prefixes = matrix.write_corpus(folder)
    legs = [matrix.Case("chain", ranks, flags) for ranks, flags in CHAIN]
    references = [matrix.Case(variant, 1, [*matrix.VARIANTS[variant], *RETAINED]) for variant in ("tied", "untied")]
    matrix.run_here([*references, legs[0]], folder, prefixes)
    branch(folder / "untied", folder / "branch, TP2 SP, ZeRO-1")
    killed = matrix.Case("killed", 2, RUNS["killed"][2])
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.start_processes(cases.killed_main, (str(folder), killed, prefixes), nprocs=2, start_method="forkserver")
    for ranks, leg in ((2, legs[1]), (4, legs[2])):
        runs = [
            matrix.Case(name, ranks, [*flags, *matrix.VARIANTS[variant], *RETAINED])
            for name, (needed, variant, flags) in RUNS.items()
            if needed == ranks
        ]
        arguments = (ranks, str(folder), [*runs, leg], prefixes)
        mp.start_processes(cases.main, arguments, nprocs=ranks, start_method="forkserver")
    branch(folder / "ZeRO-2", folder / "branch of ZeRO-2")
    matrix.run_here([legs[3], matrix.Case("branch of ZeRO-2", 1, RETAINED)], folder, prefixes)
    with session():
        return Results(folder, cases.bf16_losses(cases.native_bf16_engine))


@pytest.mark.parametrize("name", [*cases.CASES, *cases.OF_FOUR])
def test_equals_the_oracle(name: str, results: Results) -> None:
    ranks = 4 if name in cases.OF_FOUR else 2
    for rank in range(ranks):
        errors: Errors = json.loads((results.folder / f"{rank} of {ranks}.json").read_text())[name]
        assert errors
        for quantity, error in errors.items():
            assert error <= BOUNDS.get(quantity, 0.0), (rank, quantity, error)


@pytest.mark.parametrize("name", cases.BF16)
def test_bf16_equals_the_native_engine_in_bf16(name: str, results: Results) -> None:
    losses = json.loads((results.folder / "0.bf16.json").read_text())[name]
    assert len(losses) == 10
    assert losses == json.loads((results.folder / "1.bf16.json").read_text())[name]
    assert max(abs(ours - theirs) for ours, theirs in zip(losses, results.native_bf16, strict=True)) <= BF16_LOSS


@pytest.mark.parametrize("name", deepspeed_memory.CASES)
def test_memory_is_what_estimate_says(name: str, results: Results) -> None:
    for rank in range(2):
        measured = json.loads((results.folder / f"{rank}.memory.json").read_text())[name]
        assert measured == pytest.approx(deepspeed_memory.CASES[name].expected(), rel=0.1), rank


@pytest.mark.parametrize("name", RUNS)
def test_a_run_equals_one_process(name: str, results: Results) -> None:
    assert len(matrix.read_steps(results.folder / name)) >= 20
    assert_close(results.folder / name, results.folder / RUNS[name][1].partition(",")[0])


def test_a_run_goes_on_in_the_other_engine(results: Results) -> None:
    assert_close(results.folder / "chain", results.folder / "tied")


def test_a_branch_of_its_run_goes_on_in_the_native_engine(results: Results) -> None:
    assert_close(results.folder / "branch of ZeRO-2", results.folder / "tied")


def test_the_killed_save_is_gone(results: Results) -> None:
    assert not list((results.folder / "killed" / "checkpoints").rglob("partial*"))


def test_its_run_is_evaluated_and_reported_as_any(results: Results, tmp_path: Path) -> None:
    means = []
    for name in ("ZeRO-3", "tied"):
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
    for variant in ("tied", "untied"):
        gaps = matrix.threshold_gaps(folder / variant, prefixes, matrix.VARIANTS[variant])
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
