"""RMSNorm, rotary positions and SwiGLU: the plain ones, or fused kernels of a package that is installed beside us.

Liger's (https://github.com/linkedin/Liger-Kernel) and apex's (https://github.com/NVIDIA/apex) need a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_lfr.model.norm import rms_norm
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
    """The parts of a layer between its matrix products and its attention."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    """(x, weight, epsilon), see norm."""
    split_and_rotate: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]] = split_and_rotate
    """(qkv, cos, sin, heads), see rope."""
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    """(gate, up), see swiglu."""


def layer_kernels(package: KernelPackage) -> LayerKernels:
    """The kernels of a package; those that it lacks are the plain ones."""
    if package == "liger":
        return LayerKernels(_liger_rms_norm, _liger_split_and_rotate, _liger_swiglu)
    return LayerKernels(rms_norm=_apex_rms_norm) if package == "apex" else LayerKernels()


def describe_layers(device_type: str, compiled: bool, package: KernelPackage) -> str:
    """The line at a run's start that names what computes RMSNorm, rotary positions and SwiGLU.

    Not compiled by default, on a GPU either: a short run would wait longer than it gains, a compiler's failure in the
    first step should meet only those who asked for one, and no GPU has shown yet what is gained over these kernels
    (tools/gpu_check.sh measures it).
    """
    if compiled:
        return "layers: compiled by torch.compile; the first step waits for the compiler"
    if package != "torch":
        return f"layers: fused kernels of {package}"
    advice = "; --compile fuses those between matrix products and attention, for a longer start"
    return f"layers: PyTorch's operations, one by one{advice if device_type == 'cuda' else ''}"


def check_package(flag: str, package: KernelPackage) -> None:
    """ValueError, with the way out, where a package cannot be used."""
    if package == "torch":
        return
    if importlib.util.find_spec(_MODULES[package]) is None:
        raise ValueError(f"{flag} {package}: it is not installed; {_HOW_TO_GET[package]}, or take {flag} torch")
    if not torch.cuda.is_available():
        raise ValueError(f"{flag} {package}: its kernels need a GPU; take {flag} torch")


def _liger_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma": all in fp32, as ours; its other mode rounds before the weight.
    y: Tensor = LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "gemma", False)
    return y


def _liger_split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k, v = qkv[..., :heads, :], qkv[..., heads, :], qkv[..., heads + 1, :]
    # [B, heads, S, D]; its sines have no sign, and it reads the first half, in which ours are negative.
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
