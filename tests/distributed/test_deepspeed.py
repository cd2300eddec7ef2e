"""DeepSpeed's engine against plain autograd, and whole runs of it against the native engine's run of one process."""

from __future__ import annotations

import json
from pathlib import Path

import parity_matrix as matrix
import pytest
import torch.multiprocessing as mp

pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")

from support import deepspeed_cases as cases
from support.close_runs import assert_close
from support.engine_cases import BOUNDS

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples" / "deepspeed"
TP, SP = matrix.TP, matrix.SP


def zero(stage: int) -> list[str]:
    return ["--deepspeed", f"--deepspeed_config={EXAMPLES / f'zero{stage}.json'}"]


RUNS: dict[str, tuple[int, str, list[str]]] = {
    "ZeRO-2": (2, "tied", zero(2)),
    "ZeRO-3": (2, "tied, full recomputation", zero(3)),
    "TP2 SP, ZeRO-1": (2, "untied, selective recomputation", [TP, "2", SP, *zero(1)]),
}
"""Name → (ranks, variant, flags)."""
CHAIN = (
    (1, ["--exit-interval", "5"]),
    (2, ["--exit-interval", "10", *zero(3)]),
    (4, ["--exit-interval", "15", TP, "2", *zero(1)]),
    (1, []),
)
"""One run: native, ZeRO-3 on two ranks, TP2 with ZeRO-1 on four, native again."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[cases.Errors]]:
    """What each case found on each rank."""
    found: dict[str, list[cases.Errors]] = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        mp.start_processes(cases.main, (ranks, str(folder)), nprocs=ranks, start_method="forkserver")
        for rank in range(ranks):
            for name, errors in json.loads((folder / f"{rank}.json").read_text()).items():
                found.setdefault(name, []).append(errors)
    return found


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_oracle(name: str, found: dict[str, list[cases.Errors]]) -> None:
    for rank, errors in enumerate(found[name]):
        assert errors
        for quantity, error in errors.items():
            assert error <= BOUNDS.get(quantity, 0.0), (rank, quantity, error)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all runs, by name; of the references by variant."""
    folder = tmp_path_factory.mktemp("deepspeed")
    prefixes = matrix.write_corpus(folder)
    references = [matrix.Case(variant, 1, matrix.VARIANTS[variant]) for variant in ("tied", "untied")]
    chain = [matrix.Case("chain", ranks, flags) for ranks, flags in CHAIN]
    matrix.run_cases([*references, chain[0]], folder, prefixes)
    started = [matrix.Case(name, ranks, [*flags, *matrix.VARIANTS[v]]) for name, (ranks, v, flags) in RUNS.items()]
    matrix.run_cases([*started, chain[1]], folder, prefixes)
    for case in chain[2:]:
        matrix.run_cases([case], folder, prefixes)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_equals_one_process(name: str, runs: Path) -> None:
    assert len(matrix.read_steps(runs / name)) >= 20
    assert_close(runs / name, runs / RUNS[name][1].partition(",")[0])


def test_a_run_goes_on_in_the_other_engine(runs: Path) -> None:
    assert_close(runs / "chain", runs / "tied")


def test_what_deepspeed_was_given_is_in_the_run_folder(runs: Path) -> None:
    given = json.loads((runs / "ZeRO-2" / "deepspeed.json").read_text())
    assert given["zero_optimization"]["stage"] == 2
    assert given["zero_optimization"]["reduce_bucket_size"] == 32 * 32  # auto
    assert given["train_micro_batch_size_per_gpu"] == 2
    assert given["gradient_clipping"] == 1.0
