"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """y = weight · x / √(mean(x²) + ε) over the last dimension, computed in fp32, returned in x's dtype."""
    if x.is_cuda:
        return F.rms_norm(x.float(), weight.shape, weight.float(), epsilon).to(x.dtype)
    y: Tensor = _RMSNorm.apply(x.float(), weight.float(), epsilon)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


class RMSNorm(nn.Module):
    """`function` (see rms_norm) with its weight."""

    def __init__(
        self, size: int, epsilon: float, function: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    ) -> None:
        super().__init__()
        self.epsilon, self.function = epsilon, function
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.epsilon)


class _RMSNorm(torch.autograd.Function):
    """PyTorch's CPU build has no fused RMSNorm; its composite takes four times as long as this."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        mean_square: Tensor = torch.linalg.vecdot(x, x).div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_().unsqueeze_(-1)
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        product = grad * normed
        d_weight = product.flatten(0, -2).sum(0)
        # d x = scale · (g − n · mean(g · n)) with g = grad · weight, n = the normed input
        mean = (product @ weight).div_(weight.shape[0]).unsqueeze_(-1)
        d_x = torch.mul(grad, weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return d_x, d_weight, None
