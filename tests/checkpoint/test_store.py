"""Checkpoints: what comes back, what damage is noticed, what a kill leaves."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from megatron_lfr.checkpoint import CheckpointStore


def some_tensors(fill: float = 1.0) -> dict[str, Tensor]:
    return {
        "model.weight": torch.full((3, 5), fill),
        "model.half": torch.full((4,), fill, dtype=torch.bfloat16),
        "optimizer.step": torch.tensor(fill),
        "counts": torch.arange(7),
        "nothing": torch.zeros(0, 3),
    }


def store_with(tmp_path: Path, *iterations: int, keep: int | None = None) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep)
    for iteration in iterations:
        store.save(iteration, some_tensors(float(iteration)), {"step": iteration})
    return store


def loaded_fill(store: CheckpointStore) -> tuple[int, float]:
    found = store.newest_whole()
    assert found is not None
    tensors = some_tensors(0.0)
    found.load_into(tensors)
    assert found.state == {"step": found.iteration}
    values = {
        float(value) for name in ("model.weight", "model.half", "optimizer.step") for value in tensors[name].flatten()
    }
    assert len(values) == 1
    return found.iteration, values.pop()


@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]),
    seed=st.integers(0, 1000),
)
def test_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype).reshape(shape)  # any bit pattern, NaNs too
    strided = torch.stack([tensor, tensor], -1)[..., 0]  # not contiguous
    store = CheckpointStore(tmp_path_factory.mktemp("store"), keep=None)
    store.save(1, {"tensor": tensor, "strided": strided}, {})
    found = store.newest_whole()
    assert found is not None
    back = {"tensor": torch.empty(shape, dtype=dtype), "strided": torch.empty(shape, dtype=dtype)}
    found.load_into(back)
    for value in back.values():
        assert value.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_state_is_json_with_floats_in_full(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=None)
    state = {"loss": 0.1 + 0.2, "rows": [1, 2], "nested": {"name": "ä"}}
    store.save(5, some_tensors(), state)
    found = store.newest_whole()
    assert found is not None
    assert found.state == state
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    with pytest.raises((TypeError, ValueError)):
        store.save(6, some_tensors(), {"bad": float("nan")})
    assert store.iterations() == [5]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3, 10, 20, keep=2)
    assert store.iterations() == [10, 20]
    assert sorted(path.name for path in store.root.iterdir()) == [
        "iter_0000010",
        "iter_0000020",
        "latest_checkpointed_iteration.txt",
    ]
    assert store_with(tmp_path / "all", 1, 2, 3).iterations() == [1, 2, 3]


def test_saving_over_an_iteration_replaces_it(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    (store.root / "iter_0000002/state.json").write_text("damaged")
    assert loaded_fill(store) == (1, 1.0)
    store.save(2, some_tensors(2.0), {"step": 2})
    assert loaded_fill(store) == (2, 2.0)


def test_nothing_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent", keep=1).newest_whole() is None


@pytest.mark.parametrize("file", ["*.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["flip", "truncate", "delete", "append", "symlink"])
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, kind: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_with(tmp_path, 1, 2)
    path = next((store.root / "iter_0000002").glob(file))
    content = bytearray(path.read_bytes())
    path.unlink()
    if kind == "flip":
        content[len(content) // 2] ^= 0x80
    elif kind == "truncate":
        del content[-3:]
    elif kind == "append":
        content += b"}"
    if kind == "symlink":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind != "delete":
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert loaded_fill(store) == (1, 1.0)
    assert "iter_0000002 is damaged and not used" in caplog.text
    assert path.name in caplog.text


def test_a_stranger_in_the_folder_is_damage(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    (store.root / "iter_0000002/shard-2.safetensors").write_bytes(b"x")
    assert loaded_fill(store) == (1, 1.0)


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "sub/file", ".."])
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path, 1, 2)
    path = store.root / "iter_0000002/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    assert loaded_fill(store) == (1, 1.0)


def test_a_run_does_not_begin_anew_where_all_are_damaged(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    for path in store.root.glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"every checkpoint is damaged: .*iter_0000002 .*iter_0000001"):
        store.newest_whole()


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("file", ["*.safetensors", "state.json", "manifest.json", ".metadata", "__0_0.distcp"])
def test_a_pickle_in_place_of_a_file_is_never_run(tmp_path: Path, file: str) -> None:
    """Even with a manifest that vouches for it."""
    from megatron_lfr.checkpoint.manifest import write_manifest

    marker = tmp_path / "exploded"
    store = store_with(tmp_path, 1)
    folder = store.root / "iter_0000001"
    path = next(folder.glob(file), folder / file)
    path.write_bytes(pickle.dumps(Bomb(marker)))
    if file != "manifest.json":
        (folder / "manifest.json").unlink()
        write_manifest(folder)
    ignored = file in (".metadata", "__0_0.distcp")  # names that DCP's other formats use; nobody reads them here
    with contextlib.nullcontext() if ignored else pytest.raises((ValueError, SafetensorError, UnicodeDecodeError)):
        loaded_fill(store)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.zeros(1)}, "holds no tensor extra"),
        ({"counts": torch.zeros(7)}, r"tensor counts is torch.int64 \[7\], here it is torch.float32 \[7\]"),
        ({"model.weight": torch.zeros(5, 3)}, r"tensor model.weight is torch.float32 \[3, 5\], here"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    found = store_with(tmp_path, 1).newest_whole()
    assert found is not None
    with pytest.raises(ValueError, match=message):
        found.load_into({**some_tensors(), **change})


def test_tensors_that_nobody_asks_for_are_refused_unless_allowed(tmp_path: Path) -> None:
    found = store_with(tmp_path, 7).newest_whole()
    assert found is not None
    part = {"counts": torch.zeros(7, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"holds the tensor model\.half, which is unknown here"):
        found.load_into(part)
    found.load_into(part, allow_extra=True)
    assert part["counts"].tolist() == list(range(7))


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    big = {**some_tensors(2.0), "big": torch.zeros(1_000_000)}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(OSError, match="checkpoint of step 2 could not be written"):
            store.save(2, big, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert [path.name for path in store.root.iterdir() if path.is_dir()] == ["iter_0000001"]
    assert loaded_fill(store) == (1, 1.0)


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from megatron_lfr.checkpoint import CheckpointStore
torch.set_num_threads(1)
store = CheckpointStore(Path(sys.argv[1]), keep=2)
found = store.newest_whole()
iteration = found.iteration if found else 0
while True:
    iteration += 1
    fill = float(iteration % 200)
    tensors = {"model.weight": torch.full((3, 5), fill), "model.half": torch.full((4,), fill, dtype=torch.bfloat16),
               "optimizer.step": torch.tensor(fill), "counts": torch.arange(7), "nothing": torch.zeros(0, 3)}
    store.save(iteration, tensors, {"step": iteration})
    print(iteration, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_last_one_reported(tmp_path: Path) -> None:
    chance = random.Random(3)
    for _ in range(5):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.2))
        process.kill()
        reported = [int(line) for line in (first + process.communicate()[0]).split()]
        iteration, fill = loaded_fill(CheckpointStore(tmp_path, keep=2))
        assert iteration in (reported[-1], reported[-1] + 1)
        assert fill == iteration % 200
