"""The mesh of all ranks, over process groups that all wait equally long for a rank."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from megatron_lfr.parallel.config import ParallelConfig

DIMENSIONS = ("pipeline", "replicate", "tensor", "shard")


def rank_grid(config: ParallelConfig, world_size: int) -> Tensor:
    """Return the numbers of all ranks as [pipeline, replicate, tensor, shard], contiguous."""
    data = config.data_parallel_size(world_size) * config.context_parallel_size
    copies = data if config.sharding == "no_shard" else config.num_distributed_optimizer_instances
    pipeline, tensor = config.pipeline_model_parallel_size, config.tensor_model_parallel_size
    # Tensor comes before shard: the tensor-parallel layer cuts a weight first, and FSDP2 cuts the rank's part of it.
    grid = torch.arange(world_size).view(pipeline, copies, -1, tensor).transpose(2, 3)
    # A copy, as `contiguous` keeps unordered strides of dimensions of size 1, which torch 2.11 does not accept.
    return grid.clone(memory_format=torch.contiguous_format)


def make_mesh(device_type: str, grid: Tensor, timeout: timedelta) -> DeviceMesh:
    """Make the mesh over the ranks of `rank_grid`. Collective. It is given its groups, as those that a mesh makes by
    itself have PyTorch's default timeout."""
    groups = []
    for dim, size in enumerate(grid.shape):
        group = make_subgroup(grid.movedim(dim, -1).reshape(-1, size), timeout)
        assert group is not None  # every rank is in the grid
        groups.append(group)
    return DeviceMesh.from_group(groups, device_type, grid, mesh_dim_names=DIMENSIONS)


def make_subgroup(rows: Tensor, timeout: timedelta) -> ProcessGroup | None:
    """Make a group of each row, and return that of this rank; None where it is in no row. Collective.

    rows: [groups, ranks of a group], ascending in each group.
    """
    if rows.shape[1] == dist.get_world_size():
        return dist.group.WORLD
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)  # type: ignore[no-untyped-call]
    mine: ProcessGroup | None = group
    return mine
