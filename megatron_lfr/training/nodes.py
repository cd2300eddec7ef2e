"""One curriculum on each machine: who keeps it, and how orders and journals get to where they are missing.

The first rank of each machine, its leader, keeps a journal and makes the orders, from losses that every rank is sent
anyway; the machine's other ranks map the order that it has written. So no order travels over the network, and none is
held twice on one machine.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_lfr import _C
from megatron_lfr.fileio import fsync_directory
from megatron_lfr.lfr import Journal
from megatron_lfr.lfr.selection import Order
from megatron_lfr.parallel import ParallelState

_PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, as seen from one rank: ranks that torchrun's GROUP_RANK (without it: the host's name) puts
    together."""

    index: int
    """This rank's machine."""
    is_leader: bool
    """Whether this rank keeps its machine's curriculum."""
    group: ProcessGroup
    """All ranks, over gloo."""
    leaders: list[int]
    """The ranks that do, one a machine; rank 0 is the first."""
    leader_group: ProcessGroup | None
    """Their group, over gloo; None on other ranks, and where there is one machine."""


def find_nodes(parallel: ParallelState) -> Nodes:
    """Collective."""
    group = parallel.control_group
    names: list[str] = [""] * group.size()
    dist.all_gather_object(names, os.environ.get("GROUP_RANK") or socket.gethostname(), group=group)
    leaders = [rank for rank, name in enumerate(names) if names.index(name) == rank]
    leader_group = dist.new_group(leaders, backend="gloo", timeout=parallel.timeout) if len(leaders) > 1 else None
    rank = dist.get_rank()
    index = leaders.index(names.index(names[rank]))
    return Nodes(index, rank in leaders, group, leaders, leader_group if rank in leaders else None)


class OrderFiles:
    """Orders as files in a scratch folder of each machine, written by its leader and mapped by all its ranks."""

    def __init__(self, nodes: Nodes, scratch: Path) -> None:
        self._nodes = nodes
        self._scratch = scratch
        if nodes.is_leader:
            scratch.mkdir(parents=True, exist_ok=True)

    def share_order(self, phase: int, order: Order | None) -> Order:
        """The order of `phase`, which leaders give, on every rank. Collective; ValueError where machines differ."""
        path = self._scratch / f"order_{phase:03d}.npy"
        if order is not None:
            aside = path.with_suffix(".tmp")
            with aside.open("wb") as file:
                np.save(file, order, allow_pickle=False)
            aside.replace(path)
        self._barrier()  # from here on, every machine has its file
        mapped: Order = np.load(path, mmap_mode="r", allow_pickle=False)
        hashes: list[int] = [0] * self._nodes.group.size()
        dist.all_gather_object(hashes, _C.order_hash(mapped), group=self._nodes.group)
        if order is not None and _C.order_hash(order) != hashes[dist.get_rank()]:
            raise ValueError(f"{path}: not the order that was written there; does another run write to this folder?")
        different = [rank for rank, found in enumerate(hashes) if found != hashes[0]]
        if different:
            raise ValueError(
                f"phase {phase}: the order's hash is {hashes[different[0]]:016x} on rank {different[0]} and "
                f"{hashes[0]:016x} on rank 0; do all machines run the same version on the same corpus?"
            )
        if order is not None:  # a mapped file stays readable without its name
            for old in self._scratch.glob("order_*.npy"):
                if old != path:
                    old.unlink()
        return mapped

    def broadcast(self, value: int) -> int:
        """Rank 0's value. Collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._nodes.group)
        return values[0]

    def _barrier(self) -> None:
        dist.barrier(group=self._nodes.group)


def share_orders(nodes: Nodes, scratch: Path) -> OrderFiles | None:
    """How the ranks of a run come to one order; None for one rank, which has it."""
    return OrderFiles(nodes, scratch) if nodes.group.size() > 1 else None


def broadcast_journal(journal: Journal | None, nodes: Nodes) -> None:
    """Give every machine's leader the journal that rank 0 has: the files `phase_*` of its folder. The machines of a
    resumed run may be others than before."""
    group = nodes.leader_group
    if group is None or journal is None:
        return
    folder = journal.folder
    is_source = nodes.index == 0
    names = [sorted((p.name, p.stat().st_size) for p in folder.glob("phase_*")) if is_source else []]
    dist.broadcast_object_list(names, src=0, group=group)
    if not is_source:
        for path in folder.glob("phase_*"):
            path.unlink()
    for name, size in names[0]:
        _broadcast_file(folder / name, size, is_source, group)
    if not is_source:
        fsync_directory(folder)


def _broadcast_file(path: Path, size: int, is_source: bool, group: ProcessGroup) -> None:
    with path.open("rb" if is_source else "wb") as file:
        for first in range(0, size, _PIECE_BYTES):
            piece = torch.empty(min(_PIECE_BYTES, size - first), dtype=torch.uint8)
            if is_source:
                file.readinto(piece.numpy())  # type: ignore[attr-defined]
            dist.broadcast(piece, src=0, group=group)
            if not is_source:
                file.write(piece.numpy().tobytes())
