"""Choice of what computes norms, rotary positions and SwiGLU: our plain ones, or an installed package's fused
kernels.

Liger's (https://github.com/linkedin/Liger-Kernel) and apex's (https://github.com/NVIDIA/apex) need a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_lfr.model.norm import layer_norm, rms_norm
from megatron_lfr.model.rope import split_and_rotate
from megatron_lfr.model.swiglu import swiglu

KernelPackage = Literal["torch", "liger", "apex"]

_MODULES = {"liger": "liger_kernel", "apex": "apex"}
_HOW_TO_GET = {
    "liger": "pip install liger-kernel",
    "apex": "build it with its CUDA extensions, see https://github.com/NVIDIA/apex#installation",
}


@dataclass(frozen=True)
class LayerKernels:
    """The functions that compute the parts of a layer between its matrix products and its attention."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    """Takes (x, weight, epsilon), as norm.rms_norm does."""
    split_and_rotate: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]] = split_and_rotate
    """Takes (qkv, cos, sin, heads), as rope.split_and_rotate does."""
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    """Takes (gate, up), as swiglu.swiglu does."""
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = layer_norm
    """Takes (x, weight, bias, epsilon), as norm.layer_norm does."""


def layer_kernels(package: KernelPackage) -> LayerKernels:
    """Return the kernels of a package, with plain ones for those that it lacks."""
    if package == "liger":
        return LayerKernels(_liger_rms_norm, _liger_split_and_rotate, _liger_swiglu)
    return LayerKernels(rms_norm=_apex_rms_norm, layer_norm=_apex_layer_norm) if package == "apex" else LayerKernels()


def describe_layers(device_type: str, compiled: bool, package: KernelPackage) -> str:
    """Return the line at a run's start that names what computes norms, rotary positions and SwiGLU.

    Layers are not compiled by default, not even on a GPU: a short run would wait longer than it gains, only those who
    asked for a compiler should meet its failures, and the gain over these kernels is not measured yet
    (tools/gpu_check.sh does that).
    """
    if compiled:
        return "layers: compiled by torch.compile; the first step waits for the compiler"
    if package != "torch":
        return f"layers: fused kernels of {package}"
    advice = "; --compile fuses those between matrix products and attention, for a longer start"
    return f"layers: PyTorch's operations, one by one{advice if device_type == 'cuda' else ''}"


def check_package(flag: str, package: KernelPackage) -> None:
    """Raise ValueError, which says what to do, where a package cannot be used."""
    if package == "torch":
        return
    if importlib.util.find_spec(_MODULES[package]) is None:
        raise ValueError(f"{flag} {package}: it is not installed; {_HOW_TO_GET[package]}, or take {flag} torch")
    if not torch.cuda.is_available():
        raise ValueError(f"{flag} {package}: its kernels need a GPU; take {flag} torch")


def _liger_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # The mode "gemma" computes all in fp32, as ours does; its other mode rounds before the weight.
    y: Tensor = LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "gemma", False)
    return y


def _liger_split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k, v = qkv[..., :heads, :], qkv[..., heads, :], qkv[..., heads + 1, :]
    # It takes [B, heads, S, D] and unsigned sines, of which it reads the first half, where ours are negative.
    angles = (cos[:, :, 0, 0], -sin[:, :, 0, 0])
    rotated_q, rotated_k = LigerRopeFunction.apply(q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), *angles)
    return rotated_q.transpose(1, 2).reshape(q.shape), rotated_k.transpose(1, 2), v


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    y: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return y


def _apex_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    y: Tensor = fused_rms_norm_affine(x, weight.to(x.dtype), weight.shape, epsilon)
    return y


def _apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    y: Tensor = fused_layer_norm_affine(x, weight.to(x.dtype), bias.to(x.dtype), weight.shape, epsilon)
    return y
