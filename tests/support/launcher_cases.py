"""Two ranks that meet under the environment of each launcher, one after the other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lfr.parallel import ParallelConfig, initialize, ranks, shutdown
from megatron_lfr.parallel.launchers import adopt_launcher
from support.launcher_environments import LAUNCHERS


def main(rank: int, ports: dict[str, int], out: str) -> None:
    torch.set_num_threads(1)
    printed = {}
    plain = dict(os.environ)
    for name, environment in LAUNCHERS.items():
        os.environ.update(environment(rank, ports[name]))
        state = initialize(ParallelConfig(distributed_backend="gloo"))
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
        launch = adopt_launcher()
        exported = {key: os.environ.get(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
        printed[name] = {
            "ranks": ranks.gather(dist.get_rank(), state.control_group),
            "sum": total.item(),
            "exported": [exported["RANK"], exported["WORLD_SIZE"], exported["LOCAL_RANK"], exported["MASTER_ADDR"]],
            "again": [launch.rank, launch.world_size, launch.local_rank, launch.node],
        }
        shutdown()
        os.environ.clear()
        os.environ.update(plain)
    Path(out, f"{rank}.json").write_text(json.dumps(printed))
