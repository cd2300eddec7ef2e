"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467) and LayerNorm (Ba et al. 2016,
https://arxiv.org/abs/1607.06450)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lfr.parallel.collectives import copy_to_group, reduce_from_group
from megatron_lfr.parallel.layers import TensorParallel


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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Compute weight · (x - mean(x)) / √(var(x) + ε) + bias over the last dimension, in fp32 and rounded once, to x's
    dtype."""
    if x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), epsilon).to(x.dtype)


class Norm(nn.Module):
    """A norm with a weight, and if asked a bias, computed by `function`, which takes them as rms_norm or layer_norm.

    `tp`: of ranks that norm different parts of a token, as its heads.
    """

    def __init__(
        self,
        size: int,
        epsilon: float,
        function: Callable[..., Tensor] = rms_norm,
        bias: bool = False,
        tp: TensorParallel | None = None,
    ) -> None:
        super().__init__()
        self.epsilon, self.function, self.tp = epsilon, function, tp or TensorParallel()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.tp.share(self.weight)
        if self.bias is None:
            return self.function(x, weight, self.epsilon)
        return self.function(x, weight, self.tp.share(self.bias), self.epsilon)


class RMSNormAcrossHeads(nn.Module):
    """RMSNorm of all heads of a token together, [..., groups, heads, head_dim], of which a rank has some groups; so is
    the weight spread."""

    shard_dims: ClassVar = {"weight": 0}

    def __init__(self, size: int, epsilon: float, tp: TensorParallel) -> None:
        super().__init__()
        self.size, self.epsilon, self.tp = size, epsilon, tp
        self.weight = nn.Parameter(torch.ones(size // tp.size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.flatten(-3).float()
        square_sum = reduce_from_group(wide.square().sum(-1, keepdim=True), self.tp.group)
        # Each rank uses the sum for its own heads: the gradients of these uses are summed.
        scale = (copy_to_group(square_sum, self.tp.group) / self.size + self.epsilon).rsqrt()
        return (wide * scale * self.weight).to(x.dtype).view(x.shape)


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
