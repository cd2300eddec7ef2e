"""Two and four tensor-parallel ranks compute what one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from support import tensor_parallel_cases as cases

Errors = dict[int, list[dict[str, dict[str, float]]]]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    """Errors by number of ranks, rank, case and quantity."""
    results = {}
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp("ranks")
        mp.start_processes(cases.main, (ranks, str(folder)), nprocs=ranks, start_method="forkserver")
        results[ranks] = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return results


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in (2, 4) for name in cases.cases(ranks)])
def test_equals_one_rank(ranks: int, name: str, errors: Errors) -> None:
    # Activations that are summed over ranks are rounded to bf16 once more.
    bound = 3e-2 if "bf16" in name else 1e-5
    for rank in range(ranks):
        for quantity, error in errors[ranks][rank][name].items():
            exact = quantity in ("ranks", "weights", "count") or quantity.startswith("sizes")
            assert error <= (0.0 if exact else bound), (rank, quantity, error)
