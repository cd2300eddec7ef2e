"""Keeps one curriculum on each node, and brings orders and journals to the ranks that lack them.

The first rank of each node, its leader, keeps a journal and makes the orders, from losses that every rank receives
anyway; the node's other ranks map the order that it has written. So no order travels over the network, and none is
in memory twice on one node.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_lfr import _C
from megatron_lfr.fileio import fsync_directory
from megatron_lfr.lfr import Journal
from megatron_lfr.lfr.selection import Order
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.files import broadcast_file
from megatron_lfr.parallel.launchers import adopt_launcher


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run, as seen from one rank. Ranks are on one node if their launcher says so, or, where it does not
    tell, if they have the same host name."""

    index: int
    """Index of this rank's node."""
    is_leader: bool
    """Whether this rank is its node's leader."""
    group: ProcessGroup
    """All ranks, over gloo."""
    leaders: list[int]
    """The leaders' ranks, one for each node; rank 0 is the first."""
    leader_group: ProcessGroup | None
    """All leaders, over gloo; None on other ranks, and where there is one node."""


def find_nodes(parallel: ParallelState) -> Nodes:
    """Find out which ranks are on one node. Collective."""
    group = parallel.control_group
    names: list[str] = [""] * group.size()
    dist.all_gather_object(names, adopt_launcher().node or socket.gethostname(), group=group)
    leaders = [rank for rank, name in enumerate(names) if names.index(name) == rank]
    leader_group = dist.new_group(leaders, backend="gloo", timeout=parallel.timeout) if len(leaders) > 1 else None
    rank = dist.get_rank()
    index = leaders.index(names.index(names[rank]))
    return Nodes(index, rank in leaders, group, leaders, leader_group if rank in leaders else None)


class OrderFiles:
    """Shares orders as files in a scratch folder of each node, written by its leader and mapped by all its ranks."""

    def __init__(self, nodes: Nodes, scratch: Path) -> None:
        self._nodes = nodes
        self._scratch = scratch
        if nodes.is_leader:
            scratch.mkdir(parents=True, exist_ok=True)

    def share_order(self, phase: int, order: Order | None) -> Order:
        """Return the order of `phase`, which leaders give, on every rank. Collective; ValueError where nodes differ."""
        path = self._scratch / f"order_{phase:03d}.npy"
        if order is not None:
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, order, allow_pickle=False)
            temporary.replace(path)
        dist.barrier(group=self._nodes.group)  # from here on, every node has its file
        mapped: Order = np.load(path, mmap_mode="r", allow_pickle=False)
        hashes: list[int] = [0] * self._nodes.group.size()
        dist.all_gather_object(hashes, _C.order_hash(mapped), group=self._nodes.group)
        if order is not None and _C.order_hash(order) != hashes[dist.get_rank()]:
            raise ValueError(f"{path}: not the order that was written there; does another run write to this folder?")
        different = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        if different:
            raise ValueError(
                f"phase {phase}: the order's hash is {hashes[different[0]]:016x} on rank {different[0]} and "
                f"{hashes[0]:016x} on rank 0; do all nodes run the same version on the same corpus?"
            )
        if order is not None:  # a mapped file stays readable without its name
            for old in self._scratch.glob("order_*.npy"):
                if old != path:
                    old.unlink()
        return mapped

    def broadcast(self, value: int) -> int:
        """Return rank 0's value. Collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._nodes.group)
        return values[0]

    def compare(self, what: str, value: int | None) -> None:
        """Compare the values that leaders give, on every rank. Collective; ValueError names the first rank that differs
        from the first leader."""
        values: list[int | None] = [None] * self._nodes.group.size()
        dist.all_gather_object(values, value, group=self._nodes.group)
        first = self._nodes.leaders[0]
        for rank in self._nodes.leaders[1:]:
            if values[rank] != values[first]:
                raise ValueError(
                    f"{what}: rank {rank} made other scores than rank {first} (digests {values[rank]:016x} and "
                    f"{values[first]:016x}); the function must depend on its argument alone, and be the same everywhere"
                )


def share_orders(nodes: Nodes, scratch: Path) -> OrderFiles | None:
    """Make what shares orders among the ranks of a run; None for a single rank, which has them."""
    return OrderFiles(nodes, scratch) if nodes.group.size() > 1 else None


def broadcast_journal(journal: Journal | None, nodes: Nodes) -> None:
    """Broadcast rank 0's journal, the files `phase_*` of its folder, to the leaders of all nodes. A resumed run may run
    on other nodes than before."""
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
        broadcast_file(folder / name, size, True, group)
    if not is_source:
        fsync_directory(folder)
