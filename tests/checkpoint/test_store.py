"""Checkpoints: what comes back, what is kept, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lfr.checkpoint import CheckpointStore
from support.checkpoint_samples import names, newest, save_filled, some_tensors, store_with

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


def random_bits(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bit pattern, NaNs with payloads and negative zeros too."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)[..., 0]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@settings(max_examples=40)
@given(shape=st.lists(st.integers(0, 4), max_size=3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, pair = random_bits(shape, dtype, generator), random_bits([2, *shape], dtype, generator)
    saved = {
        "whole": values,
        "tied": values,
        "flat view": values.reshape(-1),
        "one half": pair[0],
        "other half": pair[1],
        "transposed": pair.transpose(0, -1),
        "parameter": torch.nn.Parameter(values, requires_grad=dtype.is_floating_point),
    }
    expected = {name: bits(tensor.detach().clone()) for name, tensor in saved.items()}
    store = CheckpointStore(tmp_path_factory.mktemp("store"), keep=None)
    store.save(1, saved, {})
    checkpoint = store.newest_complete()
    assert checkpoint is not None
    target = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in saved.items()}
    target["transposed"] = torch.zeros_like(pair).transpose(0, -1)  # not contiguous
    checkpoint.load_into(target)
    for name, tensor in target.items():
        assert bits(tensor).equal(expected[name]), name


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text(),
        st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9),
    )
)
def test_state_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("store"), keep=None)
    store.save(5, {}, state)
    checkpoint = store.newest_complete()
    assert checkpoint is not None
    assert repr(checkpoint.state) == repr(state)  # a float is not an int, -0.0 is not 0.0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"loss": {"train": [0.0, float("nan")]}}, r"^state\['loss'\]\['train'\]\[1\] is nan"),
        ({"loss": float("inf")}, r"^state\['loss'\] is inf"),
        ({"rng": {"cpu": torch.zeros(2)}}, r"^state\['rng'\]\['cpu'\] is a Tensor"),
        ({"folder": Path("x")}, r"^state\['folder'\] is a \w*Path"),
        ({"visits": {3: 1}}, r"^state\['visits'\]: the key 3 is a int"),
    ],
)
def test_state_that_json_cannot_hold_is_refused_by_name(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    store = store_with(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        store.save(2, some_tensors(), state)
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_what_is_not_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "root", keep=None)
    for tensors, message in [
        ({"lr": 0.1}, "lr is a float; only tensors"),
        ({"w": torch.zeros(1, device="meta")}, "w is on the meta device"),
        ({"__metadata__": torch.zeros(1)}, "'__metadata__' is not a name"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.save(1, tensors, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iteration is -1"):
        store.save(-1, {}, {})
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)
    assert not (tmp_path / "root").exists()


def test_a_checkpoint_holds_these_files(tmp_path: Path) -> None:
    folder = store_with(tmp_path, 100).root / "iter_0000100"
    assert names(tmp_path) == ["iter_0000100", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "100\n"
    assert names(folder) == ["manifest.json", "shard-00001-model-00001-of-00001.safetensors", "state.json"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3, 10, 20, keep=2)
    assert store.iterations() == [10, 20]
    assert names(tmp_path) == ["iter_0000010", "iter_0000020", "latest_checkpointed_iteration.txt"]
    assert store_with(tmp_path / "all", 1, 2, 3).iterations() == [1, 2, 3]
    assert store_with(tmp_path / "one", 1, 2, 12_345_678, keep=1).iterations() == [12_345_678]


def test_saving_over_an_iteration_replaces_it(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    (tmp_path / "iter_0000002/state.json").write_text("damaged")
    assert newest(tmp_path) == (1, 1)
    save_filled(store, 2, 5)
    assert newest(tmp_path) == (2, 5)
    save_filled(store, 2, 6)
    assert newest(tmp_path) == (2, 6)
    assert names(tmp_path) == ["iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"]


def test_nothing_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent", keep=1).newest_complete() is None
    (tmp_path / ".tmp-iter_0000003").mkdir()  # a kill before the first
    (tmp_path / "iter_12").mkdir()
    (tmp_path / "iter_00000012").mkdir()  # no name that a store gives
    assert newest(tmp_path) is None


def test_looking_into_the_folder_of_a_running_run_changes_nothing(tmp_path: Path) -> None:
    store_with(tmp_path, 1)
    (tmp_path / ".tmp-iter_0000002").mkdir()
    assert newest(tmp_path) == (1, 1)
    assert (tmp_path / ".tmp-iter_0000002").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.zeros(1)}, "holds no tensor extra"),
        ({"counts": torch.zeros(7)}, r"tensor counts is torch.int64 \[7\], here it is torch.float32 \[7\]"),
        ({"model.weight": torch.zeros(5, 3)}, r"tensor model.weight is torch.float32 \[3, 5\], here"),
        ({"model.half": 1.0}, "model.half is a float"),
    ],
)
def test_other_models_are_refused_before_anything_is_overwritten(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    checkpoint = store_with(tmp_path, 1).newest_complete()
    assert checkpoint is not None
    target = {**some_tensors(0.0), **change}
    with pytest.raises(ValueError, match=message):
        checkpoint.load_into(target)
    assert target["optimizer.step"] == 0.0


def test_tensors_that_nobody_asks_for_are_refused_unless_allowed(tmp_path: Path) -> None:
    checkpoint = store_with(tmp_path, 7).newest_complete()
    assert checkpoint is not None
    part = {"counts": torch.zeros(7, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"holds the tensor model\.half, which is unknown here"):
        checkpoint.load_into(part)
    checkpoint.load_into(part, allow_extra=True)
    assert part["counts"].tolist() == [7] * 7
