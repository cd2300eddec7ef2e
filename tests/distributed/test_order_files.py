"""How the ranks of a machine, and machines without a common disk, come to one order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from support import order_file_cases as cases


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    folder = tmp_path_factory.mktemp("orders")
    mp.start_processes(cases.main, (str(folder),), nprocs=2, start_method="forkserver")
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


def test_no_rank_reads_an_order_before_it_is_written(found: list[dict[str, Any]]) -> None:
    assert found[0]["slow leader"] == found[1]["slow leader"] == cases.ORDER.tolist()


def test_machines_without_a_common_disk_need_none(found: list[dict[str, Any]]) -> None:
    assert found[0]["two machines"]["same"] == found[1]["two machines"]["same"] == cases.ORDER.tolist()


def test_machines_that_differ_stop(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert "phase 1: the order's hash is" in found[rank]["two machines"]["error"]
