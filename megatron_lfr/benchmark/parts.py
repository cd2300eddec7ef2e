"""Times the parts of a step on the device: by events on a GPU, by the clock on a CPU, where the host computes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from megatron_lfr.parallel.spans import BACKWARD, FORWARD, MICRO_BATCHES, OPTIMIZER, REDUCTION, listening, span

STEP = "step"
GATHERING = "gathering weights"
PIPELINE = "waiting in the pipeline"
REST = "rest"
PARTS = (FORWARD, BACKWARD, REDUCTION, GATHERING, PIPELINE, OPTIMIZER, REST)
"""The parts that a step's time is divided into; none contains another one."""


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, from and to where the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@dataclass
class _Mark:
    name: str
    outer: int
    """Index of the part around it; -1 for none."""
    begin: Any
    end: Any = None


class PartTimer:
    """Listens to spans and keeps when each began and ended.

    Backward passes of a GPU run in a thread of autograd's while that which called them waits: so one list serves both.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[_Mark] = []
        self._current = -1

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer, self._current = self._current, len(self._marks)
        mark = _Mark(name, outer, self._now())
        self._marks.append(mark)
        try:
            yield
        finally:
            mark.end = self._now()
            self._current = outer

    def take(self, is_pipeline: bool) -> dict[str, float]:
        """Return the seconds of each of PARTS, which add up to those of STEP, and of MICRO_BATCHES, since the last
        call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        marks, self._marks = self._marks, []
        lengths = [self._between(mark.begin, mark.end) for mark in marks]
        alone = list(lengths)
        for mark, length in zip(marks, lengths, strict=True):
            if mark.outer >= 0:
                alone[mark.outer] -= length
        seconds = dict.fromkeys((*PARTS, STEP, MICRO_BATCHES), 0.0)
        names = {STEP: REST, MICRO_BATCHES: PIPELINE if is_pipeline else REST}
        for mark, length, exclusive in zip(marks, lengths, alone, strict=True):
            seconds[names.get(mark.name, mark.name)] += exclusive
            if mark.name in (STEP, MICRO_BATCHES):
                seconds[mark.name] += length
        return seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        seconds: float = begin.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - begin
        return seconds


@contextmanager
def timing(timer: PartTimer) -> Iterator[None]:
    """Time all parts during the block, those inside of FSDP2 and DeepSpeed as well.

    There, they lie in backward and forward. The sums over ranks run beside the computation: what is timed is what a
    GPU's main stream waits for, so the part that is not hidden, with the copies before and after.
    """
    with ExitStack() as stack:
        stack.enter_context(listening(timer))
        for owner, method, name in _private_methods():
            stack.enter_context(mock.patch.object(owner, method, _spanned(getattr(owner, method), name)))
        yield


def _private_methods() -> list[tuple[Any, str, str]]:
    """List the methods of PyTorch and DeepSpeed that reduce gradients and gather weights, with their parts."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    methods: list[tuple[Any, str, str]] = [
        (FSDPParamGroup, "post_backward", REDUCTION),
        (FSDPState, "_root_post_backward_final_callback", REDUCTION),
        (FSDPParamGroup, "wait_for_unshard", GATHERING),
    ]
    if engine := sys.modules.get("deepspeed.runtime.engine"):  # an engine of it is running
        methods.append((engine.DeepSpeedEngine, "allreduce_gradients", REDUCTION))
    return methods


def _spanned(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return method(*args, **kwargs)

    return timed
