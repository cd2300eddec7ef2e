"""SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) · up, elementwise; silu(x) = x / (1 + exp(−x)). Shapes and dtypes are equal."""
    if torch.compiler.is_compiling():  # the compiler decides by itself what to compute again
        return F.silu(gate) * up
    y: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    """SwiGLU that computes silu(gate) again in the backward, which keeps a quarter less of a feed-forward's
    activations."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate: Tensor = torch.ops.aten.silu_backward(grad * up, gate)
        return d_gate, F.silu(gate).mul_(grad)
