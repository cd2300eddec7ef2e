"""The process groups of a run, from torchrun's environment or for this process alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Backend = Literal["auto", "nccl", "gloo"]


@dataclass(frozen=True)
class ParallelState:
    """Where this rank stands in a mesh of data-parallel × tensor-parallel ranks; tensor ranks are neighbours."""

    mesh: DeviceMesh
    device: torch.device
    """Where this rank computes."""

    @property
    def tensor_group(self) -> ProcessGroup:
        """Ranks that share each layer's matrices."""
        return self.mesh.get_group("tensor")

    @property
    def data_group(self) -> ProcessGroup:
        """Ranks that hold the same part of the model and see different blocks."""
        return self.mesh.get_group("data")


_state: ParallelState | None = None


def initialize(
    backend: Backend = "auto",
    timeout: timedelta = timedelta(minutes=10),
    tensor_model_parallel_size: int = 1,
) -> ParallelState:
    """Start torch.distributed, as torchrun's environment says or with one rank where there is none.

    One rank keeps its store in memory, so that runs side by side never meet on a port. A process that has started
    torch.distributed already keeps it. ValueError where the backend or the sizes do not fit.
    """
    global _state
    use_cuda = torch.cuda.is_available() if backend == "auto" else backend == "nccl"
    if use_cuda and not torch.cuda.is_available():
        raise ValueError("--distributed-backend nccl: no CUDA device is here; choose gloo or auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _state = None
        name = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(name, timeout=timeout)
        else:
            dist.init_process_group(name, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    world_size = dist.get_world_size()
    if tensor_model_parallel_size < 1 or world_size % tensor_model_parallel_size:
        raise ValueError(
            f"--tensor-model-parallel-size {tensor_model_parallel_size}: must divide the {world_size} ranks"
        )
    shape = (world_size // tensor_model_parallel_size, tensor_model_parallel_size)
    if _state is None or _state.mesh.shape != shape or _state.device != device:
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        _state = ParallelState(mesh, device)
    return _state


def shutdown() -> None:
    """Stop torch.distributed, if it runs."""
    global _state
    _state = None
    if dist.is_initialized():
        dist.destroy_process_group()
