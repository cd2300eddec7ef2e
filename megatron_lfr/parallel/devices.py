"""What accelerators can do at most, by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """An accelerator's rates, of dense matrices, and those of what connects it."""

    bf16_tflops: float
    """10^12 floating-point operations a second in bfloat16, without sparsity."""
    fp32_tflops: float | None
    """The same in fp32, without TF32; None where it is not known here."""
    memory_gb: float
    """10^9 bytes."""
    memory_gb_per_second: float
    link_gb_per_second: float
    """Between the GPUs of a node, in each direction."""
    network_gb_per_second: float
    """Of a GPU to other nodes, in each direction, as the maker's own servers have it."""


DEVICES = {
    "a100": Device(312.0, 19.5, 80.0, 2039.0, 300.0, 25.0),
    "h100": Device(989.0, 67.0, 80.0, 3350.0, 450.0, 50.0),
    "h200": Device(989.0, 67.0, 141.0, 4800.0, 450.0, 50.0),
    "b200": Device(2250.0, None, 180.0, 8000.0, 900.0, 50.0),
}
"""The SXM modules, from NVIDIA's data sheets of A100 80GB, H100, H200 and DGX A100, H100, H200 and B200."""


def device_key(name: str) -> str | None:
    """Return the key in DEVICES of what PyTorch calls `name`, such as "NVIDIA H100 80GB HBM3"; None for another one,
    among them the slower PCIe cards of the same names."""
    words = name.lower().replace("-", " ").split()
    is_other = {"pcie", "nvl"} & set(words)
    return None if is_other else next((key for key in DEVICES if key in words), None)


def device_name(device: torch.device) -> str:
    """Return what PyTorch calls a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_tflops(device: torch.device, is_bf16: bool) -> float | None:
    """Return the peak of this rank's device in the type that it computes in; None where it is not known."""
    key = device_key(device_name(device))
    if key is None:
        return None
    return DEVICES[key].bf16_tflops if is_bf16 else DEVICES[key].fp32_tflops
