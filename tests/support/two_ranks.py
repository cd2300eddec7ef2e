"""`megatron-lfr train` on two ranks without a launcher, from the fork server, which has imported everything."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

from megatron_lfr.cli import main
from support.ports import free_port

Prepare = Callable[[int], None]


def train_two_ranks(arguments: list[str], output: Path, machines: int = 1, prepare: Prepare | None = None) -> str:
    """Return what rank 0 prints, which goes to the file `output`. An exception where a rank fails.

    machines: 1, or 2 for ranks of a machine each. prepare: called by each rank, with its number, before it starts.
    """
    port = free_port()
    given = (port, machines, str(output), prepare, arguments)
    mp.start_processes(_train, given, nprocs=2, start_method="forkserver")
    return output.read_text()


def _train(rank: int, port: int, machines: int, output: str, prepare: Prepare | None, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    machine = rank % machines
    environment = {
        "RANK": rank,
        "GROUP_RANK": machine,
        "LOCAL_RANK": rank - machine,
        "WORLD_SIZE": 2,
        "MASTER_PORT": port,
    }
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in environment.items()}})
    if rank == 0:
        sys.stdout = Path(output).open("w")  # noqa: SIM115
    if prepare is not None:
        prepare(rank)
    code = main(["train", *arguments])
    sys.stdout.flush()
    assert code == 0
