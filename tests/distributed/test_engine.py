"""The engine in each layout against plain autograd over whole batches."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from support import engine_cases as cases

Found = list[dict[str, cases.Found]]


def run(ranks: int, names: list[str], folder: Path, start_method: str = "forkserver") -> Found:
    """Errors by rank, case and quantity."""
    mp.start_processes(cases.main, (ranks, str(folder), names), nprocs=ranks, start_method=start_method)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def assert_small(found: Found, name: str) -> None:
    for rank, errors in enumerate(found):
        assert errors[name]
        for quantity, error in errors[name].items():
            assert error <= cases.BOUNDS.get(quantity, 0.0), (rank, quantity, error)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """What all cases of a number of ranks found, which are started once for it."""

    @functools.cache
    def of(ranks: int) -> Found:
        names = [name for name, (needed, _) in cases.CASES.items() if needed == ranks]
        return run(ranks, names, tmp_path_factory.mktemp(f"ranks{ranks}"))

    return of


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_oracle(name: str, found: Callable[[int], Found]) -> None:
    assert_small(found(cases.CASES[name][0]), name)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("name", cases.COMPILED)
def test_compiled_layers_equal_the_oracle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    # Spawned: ranks from the fork server have its environment.
    assert_small(run(cases.COMPILED[name][0], [name], tmp_path, "spawn"), name)
