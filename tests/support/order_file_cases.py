"""What two ranks find when they share orders: each writes `<rank>.json`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_lfr.training.nodes import Nodes, OrderFiles

STALE = np.arange(7, dtype=np.uint32)
ORDER = np.array([5, 3, 1, 4, 2, 0, 6], np.uint32)


def slow_leader(rank: int, folder: Path) -> list[int]:
    """One node, whose leader takes its time, and whose folder holds the order of a run before."""
    (folder / "scratch").mkdir(exist_ok=True)
    if rank == 0:
        np.save(folder / "scratch/order_000.npy", STALE)
    dist.barrier()
    save = np.save

    def slowly(*given: Any, **more: Any) -> None:
        time.sleep(0.5)
        save(*given, **more)

    np.save = slowly
    try:
        files = OrderFiles(Nodes(0, rank == 0, dist.group.WORLD, [0], None), folder / "scratch")  # type: ignore[arg-type]
        shared: list[int] = files.share_order(0, ORDER if rank == 0 else None).tolist()
    finally:
        np.save = save
    return shared


def two_nodes(rank: int, folder: Path) -> dict[str, Any]:
    """Two nodes, whose disks have nothing in common; then they differ."""
    mine = folder / f"disk_{rank}"
    files = OrderFiles(Nodes(rank, True, dist.group.WORLD, [0, 1], dist.group.WORLD), mine)  # type: ignore[arg-type]
    same = files.share_order(0, ORDER).tolist()
    try:
        files.share_order(1, ORDER if rank == 0 else ORDER[::-1].copy())
    except ValueError as error:
        return {"same": same, "error": str(error)}
    return {"same": same, "error": None}


def compared(rank: int, folder: Path) -> list[str | None]:
    """Return what each rank hears: of leaders that agree, of one that differs, and of a follower without a value."""
    errors: list[str | None] = []
    for leaders, values in (([0, 1], [7, 7]), ([0, 1], [7, 8]), ([0], [7, None])):
        nodes = Nodes(rank, rank in leaders, dist.group.WORLD, leaders, None)  # type: ignore[arg-type]
        try:
            OrderFiles(nodes, folder / f"disk_{rank}").compare("phase 3: score call:a:b", values[rank])
            errors.append(None)
        except ValueError as error:
            errors.append(str(error))
    return errors


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {
        "slow leader": slow_leader(rank, Path(folder)),
        "two nodes": two_nodes(rank, Path(folder)),
        "compared": compared(rank, Path(folder)),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
