"""Ranks of one node, and nodes without a common disk, agree on one order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from support import order_file_cases as cases


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what the cases return, by rank."""
    folder = tmp_path_factory.mktemp("orders")
    mp.start_processes(cases.main, (str(folder),), nprocs=2, start_method="forkserver")
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


def test_no_rank_reads_an_order_before_it_is_written(results: list[dict[str, Any]]) -> None:
    assert results[0]["slow leader"] == results[1]["slow leader"] == cases.ORDER.tolist()


def test_nodes_without_a_common_disk_need_none(results: list[dict[str, Any]]) -> None:
    assert results[0]["two nodes"]["same"] == results[1]["two nodes"]["same"] == cases.ORDER.tolist()


def test_nodes_that_differ_stop(results: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert "phase 1: the order's hash is" in results[rank]["two nodes"]["error"]


def test_scores_that_differ_name_the_rank(results: list[dict[str, Any]]) -> None:
    for rank in range(2):
        alike, differing, followed = results[rank]["compared"]
        assert alike is None
        assert differing.startswith("phase 3: score call:a:b: rank 1 made other scores than rank 0 (digests 0")
        assert followed is None
