"""Counts what the ranks of each group send in a step, and times each of these collectives alone."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_lfr.benchmark.parts import seconds_of
from megatron_lfr.model import layers
from megatron_lfr.parallel import ParallelState, ranks

OPERATIONS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast_": "broadcast",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
}
"""PyTorch's operators of the namespaces c10d and _c10d_functional."""
_REPEATS = 5


@dataclass(frozen=True, order=True)
class Collective:
    """A collective of a group, as often as it happens in a step."""

    group: str
    """What the group is for: tensor, pipeline, context, shard, replicate, losses, control, all."""
    operation: str
    bytes: int
    """Of the full tensor: what is gathered, or the input of a reduce-scatter."""
    members: tuple[int, ...]
    """The ranks of the group."""
    dtype: str


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives of this rank during the block, by the group and the size."""

    def __init__(self, parallel: ParallelState) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Collective] = Counter()
        self.groups = named_groups(parallel)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and func._opname in OPERATIONS:
            self._count(OPERATIONS[func._opname], func.namespace == "_c10d_functional", args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, is_functional: bool, args: tuple[Any, ...]) -> None:
        name = args[-1] if is_functional else next(_group(arg).group_name for arg in args if _is_group(arg))
        if name not in self.groups:
            return
        label, group = self.groups[name]
        sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in map(_tensors, args)]
        size, first = max(sizes), next(tensor for arg in args for tensor in _tensors(arg))
        if is_functional and operation == "all-gather":  # its output is no argument
            size *= group.size()
        members = tuple(dist.get_process_group_ranks(group))
        self.counts[Collective(label, operation, size, members, str(first.dtype).removeprefix("torch."))] += 1


@contextmanager
def counting(parallel: ParallelState) -> Iterator[CollectiveCounter]:
    """Count the collectives of the block. While operators are watched, PyTorch runs nothing that is compiled, so layers
    run as they are written, with the same collectives. Nor can it make its causal bias of context-parallel attention,
    so they are not watched where that is made."""

    def unwatched(*args: Any) -> Any:
        with _disable_current_modes():
            return causal_lower_right(*args)

    eager = torch.compiler.set_stance("force_eager")
    with eager, mock.patch.object(layers, "causal_lower_right", unwatched), CollectiveCounter(parallel) as counter:
        yield counter


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def _group(value: Any) -> ProcessGroup:
    group: ProcessGroup = ProcessGroup.unbox(value)
    return group


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for one in value for tensor in _tensors(one)] if isinstance(value, list | tuple) else []


def named_groups(parallel: ParallelState) -> dict[str, tuple[str, ProcessGroup]]:
    """Return the groups of more than one rank by PyTorch's names, each with what it is for: "tensor/all" where it
    serves both."""
    world = dist.group.WORLD
    assert world is not None
    mesh = {name: parallel.mesh.get_group(name) for name in ("tensor", "pipeline", "shard", "replicate")}
    groups = {
        **mesh,
        "context": parallel.context_group,
        "losses": parallel.losses_group,
        "control": parallel.control_group,
        "all": world,
    }
    named: dict[str, tuple[str, ProcessGroup]] = {}
    for purpose, group in groups.items():
        if group is None or group.size() == 1:
            continue
        earlier = named.get(group.group_name)
        named[group.group_name] = (f"{earlier[0]}/{purpose}" if earlier else purpose, group)
    return named


def describe(counter: CollectiveCounter, parallel: ParallelState) -> list[dict[str, Any]]:
    """Return the collectives of all ranks in a step: for each group, operation and size the calls of the rank that has
    most, the seconds of one alone on the slowest rank, and the bandwidth as nccl-tests counts that of the bus.
    Collective."""
    counted = ranks.gather([(dataclasses.astuple(one), n) for one, n in counter.counts.items()], parallel.control_group)
    by_rank = [{Collective(*values): n for values, n in one} for one in counted]
    rows: dict[tuple[str, str, int, int], dict[str, Any]] = {}
    alone = ranks.gather(_time_alone(counter, by_rank, parallel), parallel.control_group)
    for number, collectives in enumerate(by_rank):
        for one, calls in collectives.items():
            key = (one.group, one.operation, len(one.members), one.bytes)
            row = rows.setdefault(key, {"calls": 0, "seconds_alone": None})
            row["calls"] = max(row["calls"], calls)
            if (seconds := alone[number].get(one)) is not None:
                row["seconds_alone"] = max(seconds, row["seconds_alone"] or 0.0)
    return [
        {
            "group": group,
            "operation": operation,
            "ranks": size,
            "bytes": count,
            **row,
            "bus_gb_per_second": _bus(operation, size, count, row["seconds_alone"]),
        }
        for (group, operation, size, count), row in sorted(rows.items())
    ]


def _bus(operation: str, size: int, count: int, seconds: float | None) -> float | None:
    if not seconds:
        return None
    factors = {
        "all-reduce": 2 * (size - 1) / size,
        "all-gather": (size - 1) / size,
        "reduce-scatter": (size - 1) / size,
    }
    return factors.get(operation, 1.0) * count / seconds / 1e9


def _time_alone(
    counter: CollectiveCounter, by_rank: list[dict[Collective, int]], parallel: ParallelState
) -> dict[Collective, float]:
    """Return the seconds of each collective that every member of its group has counted. All ranks go through them in
    the same order, so that none waits for one that is in another group."""
    groups = dict(counter.groups.values())
    seconds = {}
    for one in sorted(counter.counts):
        on_device = parallel.device if one.group != "control" else torch.device("cpu")
        call = _call(one, groups[one.group], on_device)
        if call is not None and all(one in by_rank[member] for member in one.members):
            seconds_of(call, on_device)  # connects the ranks, and brings them together
            seconds[one] = statistics.median(seconds_of(call, on_device) for _ in range(_REPEATS))
    return seconds


def _call(one: Collective, group: ProcessGroup, device: torch.device) -> Callable[[], object] | None:
    """Return what runs a collective once; None for those that not all ranks of the group take part in."""
    dtype: torch.dtype = getattr(torch, one.dtype)
    elements, size = max(1, one.bytes // dtype.itemsize), group.size()
    full = torch.zeros(elements, dtype=dtype, device=device)
    part = torch.zeros(max(1, elements // size), dtype=dtype, device=device)
    full_parts = full[: len(part) * size] if len(part) * size <= len(full) else full.new_zeros(len(part) * size)
    match one.operation:
        case "all-reduce":
            return lambda: dist.all_reduce(full, group=group)
        case "all-gather":
            return lambda: dist.all_gather_into_tensor(full_parts, part, group=group)
        case "reduce-scatter":
            return lambda: dist.reduce_scatter_tensor(part, full_parts, group=group)
        case "broadcast":
            return lambda: dist.broadcast(full, group_src=0, group=group)
        case _:
            return None


def total_seconds(rows: Iterable[dict[str, Any]], *groups: str) -> float:
    """Return the seconds that the collectives of groups for these purposes would take in a step, one after the
    other."""
    same = (row for row in rows if set(row["group"].split("/")) & set(groups))
    return sum((row["calls"] * float(row["seconds_alone"] or 0.0) for row in same), 0.0)
