"""Bandwidth between nodes: an all-reduce of each pair of neighbours in a ring; then of each node that may be slow with
one that is not, which tells a slow node from a slow path between two nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_lfr.parallel import ParallelState, ranks

Pair = tuple[int, int]
"""Two nodes' indices, the lower one first."""

_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
_ROUNDS = 4
_SLOW = 0.5
"""A link is slow below this share of the fastest."""


@dataclass(frozen=True)
class Links:
    """What was measured between nodes, as bandwidths in GB/s."""

    speeds: dict[Pair, float]
    """Of the ring's pairs, and of those that were measured to find out what is slow."""
    bound: float
    """Below it, a link is slow."""
    slow_nodes: list[int]
    """Nodes that are slow with a node that is not."""
    slow_pairs: list[Pair]
    """Pairs that are slow though neither node is known to be."""


def measure_links(parallel: ParallelState, leaders: list[int], least: float | None) -> Links:
    """Measure the ring of at least two nodes and find out what is slow. Returns the same on every rank.

    leaders: a rank of each node. least: bandwidth below which a link is slow; by default half of the fastest, so that
    two nodes are never slow. Collective.
    """
    return find_slow(len(leaders), least, lambda pairs: _measure(parallel, leaders, pairs))


def find_slow(count: int, least: float | None, measure: Callable[[list[Pair]], dict[Pair, float]]) -> Links:
    """Find out what is slow among `count` nodes by measuring pairs; `least` as for `measure_links`."""
    ring = sorted({_pair(node, (node + 1) % count) for node in range(count)})
    speeds = measure(ring)
    bound = _SLOW * max(speeds.values()) if least is None else least
    fast = sorted({node for pair in ring if speeds[pair] >= bound for node in pair})
    unclear = [node for node in range(count) if node not in fast]  # slow by itself, or only between two slow nodes?
    slow_nodes = []
    if fast:
        tests = [_test(node, fast, ring) for node in unclear]
        speeds |= measure([pair for pair in tests if pair not in speeds])
        slow_nodes = [node for node, pair in zip(unclear, tests, strict=True) if speeds[pair] < bound]
    slow_pairs = [pair for pair in ring if speeds[pair] < bound and not set(slow_nodes) & set(pair)]
    return Links(speeds, bound, slow_nodes, slow_pairs)


def _test(node: int, fast: list[int], ring: list[Pair]) -> Pair:
    """Choose the fast node to measure `node` with: none whose path to it is known to be slow, if there is another."""
    pairs = [_pair(node, other) for other in fast]
    others = [pair for pair in pairs if pair not in ring] or pairs
    return others[node % len(others)]


def _pair(one: int, other: int) -> Pair:
    return min(one, other), max(one, other)


def _measure(parallel: ParallelState, leaders: list[int], pairs: list[Pair]) -> dict[Pair, float]:
    """Return GB/s of each pair on every rank; pairs without a common node are measured at the same time."""
    rank = dist.get_rank()
    local: dict[Pair, float] = {}
    for disjoint in _rounds(pairs):
        for pair in disjoint:
            members = [leaders[node] for node in pair]
            if rank in members:
                group = dist.new_group(members, timeout=parallel.timeout, use_local_synchronization=True)
                local[pair] = _bandwidth(group, parallel.device)
                dist.destroy_process_group(group)
        dist.barrier(group=parallel.control_group)
    return {pair: speed for speeds in ranks.gather(local, parallel.control_group) for pair, speed in speeds.items()}


def _rounds(pairs: list[Pair]) -> list[list[Pair]]:
    """Divide pairs into rounds, in each of which no node occurs twice."""
    rounds: list[list[Pair]] = []
    for pair in pairs:
        for disjoint in rounds:
            if not {node for other in disjoint for node in other} & set(pair):
                disjoint.append(pair)
                break
        else:
            rounds.append([pair])
    return rounds


def _bandwidth(group: ProcessGroup, device: torch.device) -> float:
    """Return GB/s of an all-reduce of two ranks, each of which sends and receives the tensor once. Collective."""
    tensor = torch.zeros(_BYTES[device.type] // 4, device=device)
    best = float("inf")
    for _ in range(_ROUNDS):  # the first one also connects
        dist.barrier(group=group)
        started = time.perf_counter()
        all_reduce(tensor, group)
        best = min(best, time.perf_counter() - started)
    return tensor.numel() * tensor.element_size() / best / 1e9


def all_reduce(tensor: torch.Tensor, group: ProcessGroup) -> None:
    """Sum a tensor over a group, and wait for it."""
    dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
