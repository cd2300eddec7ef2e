"""Two ranks without torchrun, of which rank 0 keeps the store: sessions one after the other, the last one failing."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_lfr.parallel import ParallelConfig, initialize, session
from support.waiting import LIMIT

LAYOUT = ParallelConfig(tensor_model_parallel_size=2, distributed_backend="gloo")


def main(rank: int, port: int) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    timeout = timedelta(seconds=LIMIT)
    for number in range(2):
        with session():
            total = torch.tensor(number + rank)
            dist.all_reduce(total, group=initialize(LAYOUT, timeout).tensor_group)
            assert total == 2 * number + 1
        assert not dist.is_initialized()
    with pytest.raises(FloatingPointError if rank == 1 else RuntimeError):
        _lose_rank_1(rank, timeout)
    assert not dist.is_initialized()


def _lose_rank_1(rank: int, timeout: timedelta) -> None:
    with session():
        state = initialize(LAYOUT, timeout)
        if rank == 1:
            raise FloatingPointError("this rank comes to no barrier")
        dist.all_reduce(torch.ones(3), group=state.losses_group, async_op=True)  # under way when this rank fails
        dist.barrier(group=state.control_group)
