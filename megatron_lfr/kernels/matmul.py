"""Matrix products that are summed, and returned, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Logits, statistics and sums are fp32; fp64 for fp64 inputs."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 (fp64 for fp64)."""
    if _is_half_on_gpu(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = compute_dtype(a)
    return torch.mm(a.to(dtype), b.to(dtype))


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, for an fp32 (fp64 for fp64) total."""
    if _is_half_on_gpu(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _is_half_on_gpu(a: Tensor) -> bool:
    return a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)
