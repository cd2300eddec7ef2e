"""Which DeepSpeed the engine takes: none but the pinned one, with all that is private in it and read here. Stand-ins
are packages in a temporary folder, and plain objects."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lfr.config.deepspeed_file import DeepSpeedConfig
from megatron_lfr.engine import deepspeed_partitions as partitions
from megatron_lfr.engine.deepspeed_package import VERSION, import_deepspeed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of a stand-in for DeepSpeed, which is imported instead of it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_SIZE", "1")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deepspeed").mkdir()
    return tmp_path / "deepspeed" / "__init__.py"


def test_the_version_is_the_one_that_is_installed_with_the_extra() -> None:
    assert f"deepspeed=={VERSION}\n" in (ROOT / "constraints.txt").read_text()
    assert set(re.findall(r'"deepspeed==(.*?)"', (ROOT / "setup.py").read_text())) == {VERSION}


@pytest.mark.parametrize("version", ["0.18.0", "0.19.80", "1.0"])
def test_another_version_is_refused(version: str, package: Path) -> None:
    package.write_text(f"__version__ = {version!r}\n")
    with pytest.raises(
        ValueError, match=re.escape(f"needs DeepSpeed {VERSION}, of which it reads the partitions, not {version}")
    ):
        import_deepspeed(on_cpu=True)


def test_a_package_without_a_version_is_refused(package: Path) -> None:
    package.write_text("")
    with pytest.raises(ValueError, match=f"needs DeepSpeed {VERSION}.*, not of no version"):
        import_deepspeed(on_cpu=True)


def test_a_package_that_cannot_be_imported_is_named(package: Path) -> None:
    package.write_text("import no_such_package\n")
    with pytest.raises(ValueError, match=r"needs DeepSpeed \(No module named 'no_such_package'\): pip install"):
        import_deepspeed(on_cpu=True)


def test_a_missing_package_is_named_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lfr.config.deepspeed_file.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--deepspeed: needs the deepspeed package \(pip install 'megatron-lfr\[deep"):
        DeepSpeedConfig(deepspeed=True, deepspeed_config="ds.json").validate()


class Optimizer(SimpleNamespace):
    """Has what the partitions of stages 1 to 3 read."""

    def __init__(self) -> None:
        flats = [torch.zeros(4)]
        super().__init__(
            optimizer=SimpleNamespace(state={}),
            single_partition_of_fp32_groups=flats,
            bit16_groups=[[]],
            averaged_gradients={},
            fp32_groups_flat_partition=flats,
            bf16_groups=[[]],
            fp32_partitioned_groups_flat=flats,
            persistent_parameters=[],
            **dict.fromkeys(
                (
                    "_lazy_init_hp_params_optimizer_state",
                    "update_lp_params",
                    "_get_fp32_opt_state_partition",
                    "_get_param_partition_rank",
                    "_reassign_or_swap_out_partitioned_parameters",
                    "invalidate_secondary_tensor",
                ),
                lambda *_, **__: None,
            ),
        )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(
            (partitions.FlatGroups, name)
            for name in ("single_partition_of_fp32_groups", "bit16_groups", "averaged_gradients")
        ),
        *((partitions.Bf16Groups, name) for name in ("fp32_groups_flat_partition", "bf16_groups")),
        *(
            (kind, name)
            for kind in (partitions.FlatGroups, partitions.Bf16Groups)
            for name in ("_lazy_init_hp_params_optimizer_state", "update_lp_params", "optimizer")
        ),
        *(
            (partitions.ShardedParameters, name)
            for name in (
                "fp32_partitioned_groups_flat",
                "_get_fp32_opt_state_partition",
                "_get_param_partition_rank",
                "_reassign_or_swap_out_partitioned_parameters",
                "persistent_parameters",
                "invalidate_secondary_tensor",
                "optimizer",
            )
        ),
    ],
)
def test_a_private_name_that_is_missing_is_named(kind: Any, name: str) -> None:
    optimizer = Optimizer()
    kind(optimizer)
    delattr(optimizer, name)
    with pytest.raises(ValueError, match=f"DeepSpeed's Optimizer has no {name}, which version {VERSION} has"):
        kind(optimizer)


def test_so_is_one_of_a_parameter() -> None:
    flat, sharded = partitions.FlatGroups(Optimizer()), partitions.ShardedParameters(Optimizer())
    parameter = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="Parameter has no _hp_mapping"):
        flat.part(parameter)
    with pytest.raises(ValueError, match="Parameter has no ds_numel"):
        sharded.part(parameter)
    for name in ("get_hp_fragment", "lp_fragment_address"):
        others = {"get_hp_fragment", "lp_fragment_address"} - {name}
        parameter._hp_mapping = SimpleNamespace(**dict.fromkeys(others))  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=f"SimpleNamespace has no {name}"):
            flat.part(parameter)


def test_so_is_the_group_of_second_copies(package: Path) -> None:
    package.write_text("")
    (package.parent / "utils").mkdir()
    (package.parent / "utils" / "__init__.py").write_text("")
    groups = package.parent / "utils" / "groups.py"
    groups.write_text("_ZERO_PARAM_INTRA_PARALLEL_GROUP = 1\n")
    partitions.set_secondary_group(None)
    assert sys.modules["deepspeed.utils.groups"]._ZERO_PARAM_INTRA_PARALLEL_GROUP is None
    del sys.modules["deepspeed.utils.groups"]._ZERO_PARAM_INTRA_PARALLEL_GROUP
    with pytest.raises(ValueError, match=r"groups has no _ZERO_PARAM_INTRA_PARALLEL_GROUP"):
        partitions.set_secondary_group(None)
