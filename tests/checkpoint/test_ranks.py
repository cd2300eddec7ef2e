"""Two ranks save and load together: what comes back on other numbers of ranks, what they agree on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from megatron_lfr.checkpoint import CheckpointStore
from support import rank_cases as cases
from support.checkpoint_samples import names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have run all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    one_rank = CheckpointStore(folder / "load_what_one_rank_saved", keep=None)
    one_rank.save(1, cases.full_tensors(), {})
    spawn(cases.main, (str(folder),), nprocs=cases.RANKS)  # type: ignore[no-untyped-call]
    return folder


def found_in(folder: Path, case: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text())[case] for rank in range(cases.RANKS)]


def test_two_ranks_read_what_they_saved(folder: Path) -> None:
    expected = {"iteration": 3, "state": {"by": 0}, "equal": True}
    assert found_in(folder, "save_and_load") == [expected, expected]


def test_each_rank_writes_its_part_and_the_manifest_lists_all(folder: Path) -> None:
    root = folder / "save_and_load/iter_0000003"
    shards = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert names(root) == ["manifest.json", *shards, "state.json"]
    assert sorted(json.loads((root / "manifest.json").read_text())["files"]) == [*shards, "state.json"]


def test_hosts_need_not_share_a_file_system(folder: Path) -> None:
    """Rank 0's host has the checkpoint, and gives it to the other one at a load."""
    first, second = found_in(folder, "disks_of_their_own")
    shards = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    files = [f"iter_0000001/{name}" for name in ("manifest.json", *shards, "state.json")]
    assert first["saved"] == [*files, "latest_checkpointed_iteration.txt"]
    assert second["saved"] == []
    assert (first["equal"], second["equal"]) == (True, True)
    assert (first["loaded"], second["loaded"]) == (first["saved"], files)
    assert "the checkpoint of iteration 2 could not be written in run: File too large" in first["full"]
    assert "the checkpoint of iteration 2 could not be written in run: rank 0: File too large" in second["full"]
    assert first["after"] == first["saved"]
    message = "run/iter_0000001: on host1 this is another checkpoint than on host0; remove it"
    assert (first["other"], second["other"]) == (f"ValueError: rank 1: {message}", f"ValueError: {message}")
    assert (first["again"], second["again"]) == ("none", "none")


def test_one_rank_reads_whole_tensors_of_what_two_saved(folder: Path) -> None:
    checkpoint = CheckpointStore(folder / "save_and_load", keep=None).newest_complete()
    assert checkpoint is not None
    target = {name: torch.zeros_like(tensor) for name, tensor in cases.full_tensors().items()}
    checkpoint.load_into(target)
    for name, tensor in cases.full_tensors().items():
        assert torch.equal(target[name], tensor), name


def test_two_ranks_read_what_one_saved(folder: Path) -> None:
    assert found_in(folder, "load_what_one_rank_saved") == [{"equal": True}] * 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("state", "state['x'] is nan"),
        ("tensor", "x is a int; only tensors are stored here"),
        ("disk", "the checkpoint of iteration 2 could not be written"),
        ("shape", "tensor replicated is torch.int64 [6], here it is torch.float32 [2]"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_both(folder: Path, case: str, message: str) -> None:
    for report in found_in(folder, "errors_on_one_rank"):
        assert message in report[case]
        assert report[case].count("Errno") <= 1


def test_a_stop_on_one_rank_is_both_ranks(folder: Path) -> None:
    one, other = found_in(folder, "stop_on_one_rank")
    assert one == {"reason": "another rank was asked to stop", "looks": 2}
    assert other == {"reason": "SIGTERM", "looks": 2}


def test_a_failed_save_of_two_ranks_leaves_the_old_checkpoint(folder: Path) -> None:
    assert [report["newest"] for report in found_in(folder, "errors_on_one_rank")] == [1, 1]
    assert names(folder / "errors_on_one_rank") == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_ranks_agree_on_the_newest_complete_one_whichever_shard_is_damaged(folder: Path) -> None:
    assert found_in(folder, "damage") == [{"iteration": 1}] * 2
