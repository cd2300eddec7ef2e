"""Two tensor-parallel ranks compute what one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensor_parallel_cases as cases
import torch.multiprocessing as mp

Found = list[dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Errors by rank, case and quantity."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(cases.main, (str(folder),), nprocs=cases.RANKS)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(cases.RANKS)]


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_one_rank(name: str, found: Found) -> None:
    # Activations that are summed over ranks are rounded to bf16 once more.
    bound = 3e-2 if "bf16" in name else 1e-5
    for rank in range(cases.RANKS):
        for quantity, error in found[rank][name].items():
            exact = quantity in ("ranks", "weights", "count") or quantity.startswith("sizes")
            assert error <= (0.0 if exact else bound), (rank, quantity, error)
