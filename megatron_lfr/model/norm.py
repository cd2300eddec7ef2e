"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute weight · x / √(mean(x²) + ε) over the last dimension, in fp32 and rounded once, to x's dtype."""
    # PyTorch 2.11 traces _RMSNorm with wrong gradients; of plain operations, the compiler makes one kernel by itself.
    if not x.is_cuda and not torch.compiler.is_compiling():
        y: Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
        return y
    if x.dtype == weight.dtype:  # as in training, where weights are gathered in the activations' dtype
        return F.rms_norm(x, weight.shape, weight, epsilon)
    # PyTorch's fused kernel takes x and weight of one dtype only.
    return F.rms_norm(x.float(), weight.shape, weight.float(), epsilon).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with a weight, computed by `function`, which takes the arguments of rms_norm."""

    def __init__(
        self, size: int, epsilon: float, function: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    ) -> None:
        super().__init__()
        self.epsilon, self.function = epsilon, function
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.epsilon)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm for CPUs, where PyTorch has no fused one: its composite takes four times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        mean_square: Tensor = torch.linalg.vecdot(wide, wide).div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_().unsqueeze_(-1)
        ctx.save_for_backward(
            x, scale, weight
        )  # as the fused kernel does; keeping the normed input in fp32 would take twice as much
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        gain, normed = weight.float(), x * scale
        product = grad * normed
        d_weight = product.flatten(0, -2).sum(0)
        # d x = scale · (g − n · mean(g · n)) with g = grad · weight, n = the normed input
        mean = (product @ gain).div_(weight.shape[0]).unsqueeze_(-1)
        del product  # its memory is reused for the gradient
        d_x = torch.mul(grad, gain).addcmul_(normed, mean, value=-1).mul_(scale)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None
