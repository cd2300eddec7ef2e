"""Check what is asked of a GPU, on tensors without numbers that say that they are on one.

Shapes and dtypes of every call are right, and nothing is read back. The Triton kernels are not run; their arguments are
checked. (Where PyTorch was built without CUDA, its fake tensors on "cuda" can be neither indexed nor differentiated.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lfr.kernels import block_cross_entropy, triton_kernels, triton_rows

KERNELS = ("row_statistics", "row_gradient", "scale_in_place", "score_slices")
MODES: dict[str, dict[str, Any]] = {
    "save": {"mode": "save"},
    "chunk": {"mode": "chunk", "chunk_rows": 24},
    "score": {"mode": "score", "score_buffer_bytes": 512 * 8192 * 4},
    "score, fused": {"mode": "score", "score_buffer_bytes": 0},
}
BLOCKS: dict[str, Any] = {
    "rows": dict,
    "ids": lambda: {"block_ids": torch.zeros(4, 16, dtype=torch.int64, device="meta"), "num_blocks": 5},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"z_loss": 1e-4, "label_smoothing": 0.1, "logit_softcap": 30.0, "vocab_size": 8195},
}


class Products(TorchDispatchMode):
    """Matrix products, which cuBLAS does on operands of one dtype; wider ones only of halves."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm.dtype_out:  # of which PyTorch 2.11's meta formula takes the dtype for a factor
            result = kwargs["out"]
            assert result.shape == (args[1].shape[0], args[2].shape[1])
        else:
            result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = (value for value in args if isinstance(value, Tensor) and value is not result)
            assert a.dtype == b.dtype
            assert result.dtype == a.dtype or (result.dtype == torch.float32 and a.dtype.itemsize == 2)
            assert all(1 in operand.stride() for operand in (a, b))
        return result


class Launches:
    """Stands where a kernel is, and keeps what it is launched with."""

    def __init__(self, name: str) -> None:
        self.names = getattr(triton_kernels, name).arg_names
        self.calls: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
            assert len(grid) == 1
            assert 0 < grid[0] < 2**31
            given = dict(zip(self.names, arguments, strict=False))
            assert list(given) + list(constants) == self.names
            tensors = [value for value in given.values() if isinstance(value, Tensor)]
            assert {tensor.device.type for tensor in tensors} == {"meta"}
            assert all(isinstance(value, Tensor | int | float) for value in given.values())
            self.calls.append(given)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Launches]]:
    """Every kernel, on a GPU that is a Hopper one and is not there."""
    stubs = {name: Launches(name) for name in KERNELS}
    for name, stub in stubs.items():
        monkeypatch.setattr(triton_kernels, name, stub)
    monkeypatch.setattr(triton_rows, "_device", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    with Products():
        yield stubs


def make_inputs(dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty(4, 16, 64, dtype=dtype, device="meta", requires_grad=True),
        torch.empty(8200, 64, dtype=weight_dtype, device="meta", requires_grad=True),
        torch.empty(4, 16, dtype=torch.int64, device="meta"),
        torch.empty(4, 16, device="meta"),
    )


@pytest.mark.parametrize(("options", "blocks"), [("plain", "rows"), ("all", "ids")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "in_place"),
    [
        (torch.bfloat16, torch.bfloat16, 1),
        (torch.bfloat16, torch.float32, 1),
        (torch.float16, torch.float16, 0),
        (torch.float32, torch.float32, 2),
    ],
)
def test_every_call_fits(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    in_place: int,
    mode: str,
    blocks: str,
    options: str,
    launches: dict[str, Launches],
) -> None:
    hidden, weight, labels, token_weight = make_inputs(dtype, weight_dtype)
    loss, stats = block_cross_entropy(
        hidden, weight, labels, token_weight, **MODES[mode], **BLOCKS[blocks](), **OPTIONS[options]
    )
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "meta")
    count = {"rows": 4, "ids": 5}[blocks]
    assert all((s.shape, s.dtype, s.device.type) == ((count,), torch.float32, "meta") for s in stats)
    if not mode.startswith("score"):
        loss.backward()  # type: ignore[no-untyped-call]
        for tensor in (hidden, weight):
            assert tensor.grad is not None
            assert (tensor.grad.dtype, tensor.grad.shape) == (tensor.dtype, tensor.shape)
    calls = {name: len(stub.calls) for name, stub in launches.items()}
    chunks = {"save": 1, "chunk": 3}.get(mode, 0)
    assert calls == {
        "row_statistics": 2 if mode == "score" else chunks,
        "row_gradient": chunks,
        "scale_in_place": in_place if mode == "save" else 0,
        "score_slices": int(mode == "score, fused"),
    }


def test_reading_a_number_would_be_an_error(launches: dict[str, Launches]) -> None:
    """So no call above makes the host wait."""
    with pytest.raises(RuntimeError):
        torch.empty(3, device="meta").sum().item()


def test_the_tiles_follow_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {}
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        half, single = (torch.empty(2, 2, device="meta", dtype=d) for d in (torch.bfloat16, torch.float32))
        chosen[capability] = triton_rows.score_config(half)
        assert triton_rows.score_config(single) is triton_rows.SCORE_FLOAT
    assert [config is triton_rows.SCORE_HOPPER for config in chosen.values()] == [False, True, False, False]
    assert all(config in (triton_rows.SCORE_HOPPER, triton_rows.SCORE_HALF) for config in chosen.values())
