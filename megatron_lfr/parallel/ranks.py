"""Agreement between the ranks of a group (None: the default group). A process without torch.distributed is one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_lfr.fileio import describe

T = TypeVar("T")


def rank(group: ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Return every rank's `value`, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def from_first_rank(value: T, group: ProcessGroup | None = None) -> T:
    """Broadcast rank 0's `value` to every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def any_rank(value: bool, group: ProcessGroup | None = None) -> bool:
    """Return whether `value` is true on any rank. The group's backend must take tensors in the host's memory."""
    return start_any([value], group)()[0]


def start_any(values: list[bool], group: ProcessGroup | None = None) -> Callable[[], list[bool]]:
    """Begin to find out which of `values` are true on any rank, over a group as for `any_rank`. Call the returned
    function once, to wait for the answer."""
    if world_size(group) == 1:
        return lambda: values
    flags = torch.tensor(values, dtype=torch.int32)
    work = dist.all_reduce(flags, group=group, async_op=True)
    assert work is not None

    def wait() -> list[bool]:
        work.wait()
        return [count > 0 for count in flags.tolist()]

    return wait


@contextmanager
def failing_together(group: ProcessGroup | None = None) -> Iterator[None]:
    """Raise an error of one rank's block on all ranks, so that no rank waits for one that has left.

    The end of the block is also a barrier: no rank passes it before all have reached it.
    """
    failure: Exception | None = None
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        failure = error
    reports = gather(None if failure is None else _describe(failure), group)
    if failure is not None:
        raise failure
    for other, report in enumerate(reports):
        if report is not None:
            kind, number, text = report
            text = f"rank {other}: {text}"
            raise OSError(number, text) if kind is OSError else kind(text)


def _describe(error: Exception) -> tuple[type[Exception], int | None, str]:
    """Return what other ranks need to raise a similar error: plain values, as not every exception can be pickled."""
    if isinstance(error, OSError):
        return OSError, error.errno, describe(error)
    return (ValueError if isinstance(error, ValueError) else RuntimeError), None, str(error)
