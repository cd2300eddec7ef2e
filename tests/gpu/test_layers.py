"""Kernels of optional packages against the plain layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lfr.model.fused import KernelPackage, LayerKernels, layer_kernels

pytestmark = pytest.mark.gpu


def needs(module: str) -> pytest.MarkDecorator:
    missing = not torch.cuda.is_available() or importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs a CUDA device and {module}")


def gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...], options: tuple[Any, ...]) -> list[Tensor]:
    """Results and the gradients of a weighted sum of them."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    results = function(*leaves, *options)
    results = list(results) if isinstance(results, tuple) else [results]
    weights = [torch.randn(r.shape, generator=torch.Generator().manual_seed(i)) for i, r in enumerate(results)]
    sum((r.float() * w.to(r.device)).sum() for r, w in zip(results, weights, strict=True)).backward()
    return [*results, *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "package", [pytest.param("liger", marks=needs("liger_kernel")), pytest.param("apex", marks=needs("apex"))]
)
def test_equals_the_plain_layers(package: KernelPackage, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain, fused = LayerKernels(), layer_kernels(package)
    x, gate, up = (torch.randn(96, 256, device="cuda", dtype=dtype).requires_grad_() for _ in range(3))
    weight = torch.rand(256, device="cuda", dtype=dtype).requires_grad_()
    qkv = torch.randn(2, 48, 3, 4, 32, device="cuda", dtype=dtype).requires_grad_()
    angles = torch.rand(1, 48, 1, 1, 16, device="cuda") * 6
    tables = (torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1))
    for name, inputs, options in (
        ("rms_norm", (x, weight), (1e-5,)),
        ("layer_norm", (x, weight, weight), (1e-5,)),
        ("swiglu", (gate, up), ()),
        ("split_and_rotate", (qkv, *tables), (2,)),
    ):
        expected, actual = (gradients(getattr(kernels, name), inputs, options) for kernels in (plain, fused))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
