"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = weight · x / √(mean(x²) + ε) over the last dimension, computed in fp32, returned in x's dtype."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon).to(x.dtype)
        y: Tensor = _RMSNorm.apply(x.float(), self.weight.float(), self.epsilon)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)


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
