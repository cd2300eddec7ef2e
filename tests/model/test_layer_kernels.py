"""Kernels of optional packages: what a machine without them is told, and which are named at the start."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lfr.engine.optimizer import OptimizerConfig, build_optimizer
from megatron_lfr.model.fused import KernelPackage, check_package, describe_layers


def needs(module: str) -> pytest.MarkDecorator:
    missing = not torch.cuda.is_available() or importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs a CUDA device and {module}")


@pytest.mark.parametrize("package", ["liger", "apex"])
def test_a_package_that_is_missing_is_named(package: KernelPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"--layer-kernels {package}: it is not installed; .*, or take .* torch"):
        check_package("--layer-kernels", package)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="--adam-kernel apex: its kernels need a GPU"):
        OptimizerConfig(adam_kernel="apex").validate()


@pytest.mark.parametrize(
    ("device", "compiled", "package", "line"),
    [
        ("cpu", False, "torch", "layers: PyTorch's operations, one by one$"),
        ("cuda", False, "torch", "layers: PyTorch's operations, one by one; --compile fuses .* longer start$"),
        ("cpu", True, "torch", "layers: compiled by torch.compile"),
        ("cuda", True, "torch", "layers: compiled by torch.compile"),
        ("cuda", False, "liger", "layers: fused kernels of liger$"),
    ],
)
def test_the_start_names_what_computes_the_layers(
    device: str, compiled: bool, package: KernelPackage, line: str
) -> None:
    assert re.match(line, describe_layers(device, compiled, package))


class StandIn(torch.optim.AdamW):
    """What apex's FusedAdam, which cannot be built without a GPU, does differently from AdamW where it is capturable:
    steps are counted once a group, in a tensor, and by what was found before; a learning rate is a tensor; states hold
    the moments alone; gradients are always dropped. It shows the adapter, not apex."""

    def __init__(
        self, groups: Any, *, adam_w_mode: bool, set_grad_none: bool, capturable: bool, lr: float, **options: Any
    ) -> None:
        assert adam_w_mode
        assert set_grad_none
        assert capturable
        super().__init__(groups, lr=torch.tensor(lr), fused=True, **options)
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def step(self, closure: None = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert isinstance(group["lr"], torch.Tensor)
            assert group["lr"].dtype == torch.float32
            assert (group["step"].shape, group["step"].dtype) == ((1,), torch.int)
            before = group["step"].float().reshape(())
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            for parameter in group["params"]:
                if state := self.state[parameter]:
                    state["step"] = before.clone()
            device = group["params"][0].device
        self.found_inf = grad_scaler._check_inf_per_device(self)[device]
        assert grad_scaler._get_scale_async() == 1
        super().step()
        for state in self.state.values():
            del state["step"]


@pytest.mark.parametrize("adam_kernel", [pytest.param("apex", marks=[pytest.mark.gpu, needs("apex")]), "stand-in"])
def test_apex_adam_continues_what_adamw_began(adam_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if adam_kernel == "stand-in":
        optimizers: Any = types.ModuleType("apex.optimizers")
        optimizers.FusedAdam = StandIn
        monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
        monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
        monkeypatch.delitem(sys.modules, "megatron_lfr.engine.apex_adam", raising=False)
    device = "cpu" if adam_kernel == "stand-in" else "cuda"
    weights = [
        [nn.Parameter(torch.full((3, 4), 0.5, device=device)), nn.Parameter(torch.ones(4, device=device))]
        for _ in range(2)
    ]
    plain, apex = (
        build_optimizer(OptimizerConfig(lr=1e-2, adam_kernel=kernel), part, [True, False])  # type: ignore[arg-type]
        for kernel, part in zip(("torch", "apex"), weights, strict=True)
    )
    generator = torch.Generator().manual_seed(0)

    def step(*chosen: int, skipped: bool = False) -> None:
        values = [torch.randn(w.shape, generator=generator).to(device) for w in weights[0]]
        for i in chosen:
            for weight, value in zip(weights[i], values, strict=True):
                weight.grad = value.clone()
            (plain, apex)[i].found_inf = torch.tensor(float(skipped), device=device)  # type: ignore[attr-defined]
            for group in (plain, apex)[i].param_groups:
                group["lr"] = 1e-2
            (plain, apex)[i].step()

    step(0)
    step(0)
    step(1, skipped=True)  # makes the states
    assert all(float(apex.state[weight]["step"]) == 0 for weight in weights[1])
    for from_weight, to_weight in zip(*weights, strict=True):
        to_weight.data.copy_(from_weight.data)
        for key, value in plain.state[from_weight].items():
            apex.state[to_weight][key].copy_(value)
    for skipped in (False, True, False, False):
        step(0, 1, skipped=skipped)
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two)
        assert set(apex.state[two]) == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in plain.state[one].items():
            torch.testing.assert_close(apex.state[two][key], value)
