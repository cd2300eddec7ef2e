"""Matrix products that are summed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of logits, statistics and sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute a b in `dtype`, by default fp32 (fp64 for fp64 inputs); it is summed in fp32 and rounded once."""
    wide = compute_dtype(a)
    dtype = wide if dtype is None else dtype
    if not _is_half_on_gpu(a):
        return torch.mm(a.to(wide), b.to(wide)).to(dtype)
    return torch.mm(a, b) if dtype == a.dtype else torch.mm(a, b, out_dtype=wide).to(dtype)


def add_matmul(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Add a b to `total` in place, in fp32 (fp64 for fp64 inputs); return a b where there is no total yet."""
    if total is None:
        return matmul(a, b)
    if _is_half_on_gpu(a):
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _is_half_on_gpu(a: Tensor) -> bool:
    return a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)
