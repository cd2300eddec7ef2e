"""RMSNorm, rotary positions and SwiGLU against fp64, and the memory that a GPU reads and writes for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lfr.model.norm import rms_norm
from megatron_lfr.model.rope import split_and_rotate
from megatron_lfr.model.swiglu import swiglu

BF16, FP32 = torch.bfloat16, torch.float32
EPSILON = 1e-2
"""Large enough to be missed."""
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def numbers(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(length: int, width: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    """Of rope_tables' form, [1, S, 1, 1, D], with an angle of its own for each position and pair."""
    angles = 6 * torch.rand(1, length, 1, 1, width // 2, generator=torch.Generator().manual_seed(7)).to(dtype)
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)


def rms_norm_oracle(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (weight * x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt(),)


def rotation_oracle(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Pairs of channels as complex numbers, turned."""
    half = qkv.shape[-1] // 2
    turned = torch.complex(qkv[..., :half], qkv[..., half:]) * torch.complex(cos[..., half:], sin[..., half:])
    rotated = torch.cat((turned.real, turned.imag), -1)
    return rotated[..., :-2, :], rotated[..., -2, :], qkv[..., -1, :]


def swiglu_oracle(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (gate / (1 + (-gate).exp()) * up,)


def results_and_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Return the results, and the gradients of floating inputs with gradients of fixed numbers."""
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    grads = [numbers(*r.shape, seed=i, dtype=BF16).to(r.device, r.dtype) for i, r in enumerate(results)]
    wanted = [x for x in inputs if x.requires_grad]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, wanted, grads)]


def case(name: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Any, Any, list[Tensor], int]:
    """Return (function, oracle, inputs, how often a result is rounded to `dtype` on its way)."""
    if name == "rms_norm":
        inputs = [numbers(48, 96, seed=1, dtype=dtype), numbers(96, seed=2, dtype=weight_dtype)]
        return lambda x, weight: rms_norm(x, weight, EPSILON), rms_norm_oracle, inputs, 1
    if name == "swiglu":
        return swiglu, swiglu_oracle, [3 * numbers(48, 96, seed=i, dtype=dtype) for i in (3, 4)], 2
    inputs = [numbers(2, 24, 3, 6, 10, seed=5, dtype=dtype), *tables(24, 10)]
    return lambda qkv, cos, sin: split_and_rotate(qkv, cos, sin, 4), rotation_oracle, inputs, 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "dtype", "weight_dtype", "backend"),
    [
        ("rms_norm", FP32, FP32, None), ("rms_norm", BF16, BF16, None), ("rms_norm", BF16, FP32, None),
        ("rotation", FP32, FP32, None), ("rotation", BF16, FP32, None),
        ("swiglu", FP32, FP32, None), ("swiglu", BF16, FP32, None),
        ("rms_norm", FP32, FP32, "aot_eager"), ("rotation", FP32, FP32, "aot_eager"),
        ("swiglu", FP32, FP32, "aot_eager"),
    ],
)  # fmt: skip
def test_equals_fp64(
    name: str, dtype: torch.dtype, weight_dtype: torch.dtype, backend: str | None, device: str
) -> None:
    """In bf16, with no rounding but those that are counted: what is between them is fp32. backend: of torch.compile."""
    function, oracle, inputs, roundings = case(name, dtype, weight_dtype)
    if backend is not None:
        function = torch.compile(function, backend=backend, fullgraph=True)
    trained = [x.dtype == dtype if name == "rotation" and dtype == BF16 else True for x in inputs]
    if name == "rotation":
        trained = [True, False, False]
    ours = [x.to(device).requires_grad_(t) for x, t in zip(inputs, trained, strict=True)]
    exact = [x.double().requires_grad_(t) for x, t in zip(inputs, trained, strict=True)]
    results, expected = results_and_gradients(function, ours), results_and_gradients(oracle, exact)
    dtypes = [dtype] * (len(results) - sum(trained)) + [x.dtype for x in ours if x.requires_grad]
    assert [x.dtype for x in results] == dtypes
    for one, other in zip(results, expected, strict=True):
        unit = roundings * 2.0**-8 if one.dtype == BF16 else 0.0  # bf16 has eight significant bits
        errors = (one.cpu().double() - other).abs()
        assert (errors <= 1.001 * unit * other.abs() + 3e-6 * other.abs().max()).all()


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write: each of an operation's tensors once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in func.name():
            return result
        read = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if func.overloadpacket == torch.ops.aten.copy_:
            read = read[1:]
        written = result if isinstance(result, tuple | list) else [result]
        self.bytes += sum(x.numel() * x.element_size() for x in [*read, *written])
        return result


class FusedRMSNorm(torch.autograd.Function):
    """Stands for PyTorch's on a GPU, which takes one dtype and reads its input and gradient for each of two results."""

    @staticmethod
    def forward(ctx: Any, traffic: Traffic, x: Tensor, weight: Tensor) -> Tensor:
        assert x.dtype == weight.dtype
        ctx.save_for_backward(x, weight)
        ctx.traffic = traffic
        traffic.bytes += 2 * x.nbytes
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.traffic.bytes += 2 * (grad.nbytes + x.nbytes) + x.nbytes
        return None, torch.empty_like(x), torch.empty_like(weight)


@pytest.mark.parametrize(
    ("name", "weight_dtype", "forward", "backward"),
    [
        # One kernel for each direction ...
        ("rms_norm", BF16, 2 * 2, 5 * 2),
        # ... and casts: of the input and the result, of the input's gradient and the result's.
        ("rms_norm", FP32, (2 + 4) + 2 * 4 + (4 + 2), (2 + 4) + 5 * 4 + (4 + 2)),
        # x · cos in fp32, and to it the other half · sin, rounded.
        ("rotation", FP32, (2 + 4) + (4 + 2 + 2), (2 + 4) + (4 + 2 + 2)),
        # silu(gate), · up; then grad · up, the gradient of silu, and again silu(gate), · grad.
        ("swiglu", FP32, 4 + 6, 6 + 6 + 4 + 6),
    ],
)
def test_memory_traffic_on_a_gpu(
    name: str, weight_dtype: torch.dtype, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes an element in bf16, on tensors without numbers that say that they are on a GPU."""
    traffic = Traffic()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, epsilon: FusedRMSNorm.apply(traffic, x, weight))
    function, _, small, _ = case(name, BF16, weight_dtype)
    # More rows, so that weights and tables do not count. Of six heads in a group, five are rotated and one is copied.
    inputs = [x.to("meta").repeat(4096, *[1] * (x.ndim - 1)) if i == 0 else x.to("meta") for i, x in enumerate(small)]
    if name == "swiglu":
        inputs[1] = torch.empty_like(inputs[0])
    for x in inputs:
        x.requires_grad_(name != "rotation" or x is inputs[0])
    with traffic:
        results = function(*inputs)
        after_forward = traffic.bytes
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad(results, [x for x in inputs if x.requires_grad], [torch.empty_like(r) for r in results])
    counted = [after_forward / inputs[0].numel(), (traffic.bytes - after_forward) / inputs[0].numel()]
    expected = [(5 * n + 4) / 6 if name == "rotation" else n for n in (forward, backward)]
    assert counted == pytest.approx(expected, rel=1e-3)
