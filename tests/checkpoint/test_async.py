"""Asynchronous saves: they hold what was there when they were asked for, come one at a time, and their errors show.

Kills are in test_crash.py.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.checkpoint import store as store_module
from support import async_cases as cases
from support import rank_cases
from support.checkpoint_samples import names, newest, save_filled, some_tensors
from support.waiting import LIMIT


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No save writes a tensor before this is set."""
    gate = threading.Event()
    write_tensors = store_module.write_tensors

    def held(*arguments: Any) -> list[str]:
        assert gate.wait(LIMIT)
        return write_tensors(*arguments)

    monkeypatch.setattr(store_module, "write_tensors", held)
    return gate


def assert_same_tensors(one: Path, other: Path) -> None:
    """In the same files, bit for bit; the order of the names in a file's header is random."""
    assert names(one) == names(other)
    for path in one.glob("*.safetensors"):
        tensors, others = load_file(path), load_file(other / path.name)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert (tensor.dtype, tensor.shape) == (others[name].dtype, others[name].shape), name
            assert tensor.view(torch.uint8).equal(others[name].view(torch.uint8)), name


def test_a_save_holds_what_was_there_when_it_was_called(tmp_path: Path, gate: threading.Event) -> None:
    store = CheckpointStore(tmp_path, keep=None, asynchronous=True)
    tensors, state = some_tensors(3.0), {"fill": 3}
    store.save(1, tensors, state)
    for tensor in tensors.values():
        tensor.zero_()
    state["fill"] = 0
    assert newest(tmp_path) is None
    gate.set()
    store.wait()
    assert newest(tmp_path) == (1, 3)


def test_it_writes_the_bytes_of_a_synchronous_save(tmp_path: Path) -> None:
    def awkward() -> dict[str, Tensor]:
        values = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        values[0, 0], values[0, 1] = float("nan"), -0.0
        return {
            **some_tensors(),
            "tied": values,
            "whole": values,
            "transposed": values.t(),
            "half of it": values[:2],
            "expanded": values[:1].expand(3, 6),
            "parameter": torch.nn.Parameter(values),
        }

    CheckpointStore(tmp_path / "synchronous", None).save(1, awkward(), {"a": [1]})
    store = CheckpointStore(tmp_path / "asynchronous", None, asynchronous=True)
    folder = store.save(1, awkward(), {"a": [1]})
    store.wait()
    assert folder == tmp_path / "asynchronous/iter_0000001"
    assert_same_tensors(tmp_path / "synchronous/iter_0000001", folder)
    assert (folder / "state.json").read_bytes() == (tmp_path / "synchronous/iter_0000001/state.json").read_bytes()


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    store = CheckpointStore(tmp_path, keep=1, asynchronous=True)
    save_filled(store, 1, 1)
    threading.Timer(0.3, gate.set).start()  # a second save that did not wait would be back before
    save_filled(store, 2, 2)
    assert (tmp_path / "latest_checkpointed_iteration.txt").exists()
    store.wait()
    assert store.iterations() == [2]
    assert newest(tmp_path) == (2, 2)


def test_a_failure_shows_in_the_next_call_as_a_synchronous_one_does(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.write_text("a file, where a folder should be")
    with pytest.raises(OSError, match="the checkpoint of iteration 1 could not be written") as expected:
        save_filled(CheckpointStore(root, None), 1, 1)
    store = CheckpointStore(root, None, asynchronous=True)
    save_filled(store, 1, 1)
    with pytest.raises(OSError) as waited:
        store.wait()
    store.wait()  # told once
    save_filled(store, 1, 1)
    with pytest.raises(OSError) as next_save:
        save_filled(store, 2, 2)
    for caught in (waited, next_save):
        assert (caught.value.errno, str(caught.value)) == (expected.value.errno, str(expected.value))
    root.unlink()
    save_filled(store, 2, 2)
    store.wait()
    assert newest(root) == (2, 2)


def test_what_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "root", None, asynchronous=True)
    with pytest.raises(ValueError, match=r"state\['x'\] is nan"):
        store.save(1, some_tensors(), {"x": float("nan")})
    store.wait()
    assert not (tmp_path / "root").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have run all cases."""
    folder = tmp_path_factory.mktemp("asynchronous")
    spawn(rank_cases.main, (str(folder), cases.CASES), nprocs=cases.RANKS)  # type: ignore[no-untyped-call]
    return folder


def found_in(folder: Path, case: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text())[case] for rank in range(cases.RANKS)]


def test_two_ranks_save_while_training_talks_and_changes_the_weights(folder: Path) -> None:
    talk = [[[turn, rank] for rank in range(cases.RANKS)] for turn in range(3) for _ in range(2)]
    expected = {"talk": talk, "before": [], "state": {"by": 0}, "equal": True}
    assert found_in(folder, "training_goes_on") == [expected, expected]


def test_two_ranks_write_the_bytes_of_a_synchronous_save(folder: Path) -> None:
    root = folder / "training_goes_on"
    assert_same_tensors(root / "synchronous/iter_0000003", root / "asynchronous/iter_0000003")


def test_where_one_rank_cannot_write_both_raise_and_the_old_checkpoint_stays(folder: Path) -> None:
    for report in found_in(folder, "one_rank_fails"):
        assert report["wait"].startswith("OSError")
        assert "checkpoint of iteration 2 could not be written" in report["wait"]
        assert "checkpoint of iteration 3 could not be written" in report["next save"]
        assert (report["left"], report["newest"], report["then"]) == ([1], 1, [1, 5])


def test_nothing_goes_over_a_default_group_that_carries_no_objects(folder: Path) -> None:
    expected = [{"synchronous": [fill] * 3, "asynchronous": [fill] * 3} for fill in (1.0, 2.0)]
    assert found_in(folder, "no_object_over_the_default_group") == expected
