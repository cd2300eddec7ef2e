"""The ranks around this one, as DeepSpeed asks for them."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_lfr.parallel import ParallelState


class Groups:
    """The groups of this rank, by the names of DeepSpeed's `mpu`. It counts the ranks that share a sequence, which hold
    the same weights, among the data-parallel ones."""

    def __init__(self, parallel: ParallelState) -> None:
        self._tensor = parallel.tensor_group
        self._data: ProcessGroup = parallel.mesh.get_group(
            "replicate" if parallel.config.sharding == "no_shard" else "shard"
        )

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()


def make_secondary_group(parallel: ParallelState, size: int) -> ProcessGroup | None:
    """Make the groups of `size` neighbouring data-parallel ranks that hold a second copy of the weights (hpZ), and
    return that of this rank; None for a size of 1. Collective.

    DeepSpeed's own groups are of neighbours among all ranks, which tensor-parallel ranks are. It lists a group's ranks
    by a loop that does not end for the group of all ranks: here, that is another group, too.
    """
    if size == 1:
        return None
    rows = parallel.mesh.mesh.reshape(-1, size).tolist()
    group, _ = dist.new_subgroups_by_enumeration(rows, timeout=parallel.timeout)  # type: ignore[no-untyped-call]
    secondary: ProcessGroup = group
    return secondary
