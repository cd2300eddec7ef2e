"""--deterministic: which settings hold inside its block, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch
from torch._inductor import config as inductor
from torch.nn import functional as F

from megatron_lfr.config.training import TrainingConfig
from megatron_lfr.engine.determinism import deterministic

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def in_force() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        inductor.deterministic,
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.cudnn_sdp_enabled(),
        *map(os.environ.get, VARIABLES),
    )


def test_what_is_in_force_in_the_block_alone() -> None:
    before = in_force()
    with deterministic(enabled=False):
        assert in_force() == before
    with deterministic(enabled=True):
        assert in_force() == (True, False, True, False, False, ":4096:8", "^NVLS")
    assert in_force() == before


def test_values_that_add_in_order_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    with deterministic(enabled=True):
        assert in_force()[-2:] == (":16:8", "Ring")
    assert in_force()[-2:] == (":16:8", "Ring")


def test_an_operation_without_a_deterministic_form_is_one_clear_error() -> None:
    before = in_force()
    x, indices = torch.ones(1, 1, 2), torch.tensor([[[0, 2]]])
    with (
        pytest.raises(ValueError, match=r"--deterministic: .* does not have a deterministic implementation"),
        deterministic(enabled=True),
    ):
        F.max_unpool1d(x, indices, 2)
    assert in_force() == before


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="mine"), deterministic(enabled=True):
        raise RuntimeError("mine")


@pytest.mark.parametrize(
    ("variable", "value", "legal"),
    [("CUBLAS_WORKSPACE_CONFIG", ":0:0", ":4096:8, :16:8"), ("NCCL_ALGO", "NVLS", r"\^NVLS, Ring, Tree")],
)
def test_an_environment_that_rules_it_out_is_refused_at_start(
    variable: str, value: str, legal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    TrainingConfig().validate(1)
    with pytest.raises(ValueError, match=f"--deterministic: goes with {variable} {legal}.* not {value}"):
        TrainingConfig(deterministic=True).validate(1)


def test_kernels_of_other_packages_are_refused() -> None:
    with pytest.raises(ValueError, match="--deterministic: goes with --layer-kernels torch, not liger"):
        TrainingConfig(deterministic=True, layer_kernels="liger").validate(1)
