"""The engine in each layout against plain autograd over complete batches."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from support import engine_cases as cases
from support.engine_errors import BOUNDS, Errors

OfRank = dict[str, Errors]
"""The errors of a rank, by case and quantity."""


def run(ranks: int, names: list[str], folder: Path, start_method: str = "forkserver") -> list[OfRank]:
    """Run cases on ranks; returns the errors by rank."""
    mp.start_processes(cases.main, (ranks, str(folder), names), nprocs=ranks, start_method=start_method)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def assert_small(by_rank: list[OfRank], name: str) -> None:
    for rank, errors in enumerate(by_rank):
        assert errors[name]
        for quantity, error in errors[name].items():
            assert error <= BOUNDS.get(quantity, 0.0), (rank, quantity, error)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[OfRank]]:
    """Return the errors of all cases of a number of ranks, by rank; the ranks are started once."""

    @functools.cache
    def of(ranks: int) -> list[OfRank]:
        names = [name for name, (needed, _) in cases.CASES.items() if needed == ranks]
        return run(ranks, names, tmp_path_factory.mktemp(f"ranks{ranks}"))

    return of


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_oracle(name: str, errors: Callable[[int], list[OfRank]]) -> None:
    assert_small(errors(cases.CASES[name][0]), name)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("name", cases.COMPILED)
def test_compiled_layers_equal_the_oracle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    # Spawned: ranks from the fork server have its environment.
    assert_small(run(cases.COMPILED[name][0], [name], tmp_path, "spawn"), name)
