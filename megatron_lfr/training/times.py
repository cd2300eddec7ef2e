"""Measures where a run's time goes, in parts that exclude each other and add up to the wall time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

PARTS = (
    "training steps",
    "waiting for data",
    "recording losses",
    "making orders",
    "rescoring",
    "evaluation",
    "saving",
    "logging",
    "rest",
)
"""The parts, with their names in metrics.jsonl, the report and the summary."""


@dataclass
class Span:
    """How long a part took this time; known once it is over."""

    seconds: float = 0.0


class Stopwatch:
    """Attributes every moment to one part: the innermost that is under way, or the rest.

    clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Reset all parts to zero."""
        self.started = time.time()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._current = "rest"
        self._since = self._clock()

    @contextmanager
    def part(self, name: str) -> Iterator[Span]:
        """Attribute the block's time to a part of PARTS, without what the block itself attributes to others."""
        outer, before, span = self._current, self._switch(name), Span()
        try:
            yield span
        finally:
            self._switch(outer)
            span.seconds = self._seconds[name] - before

    def each(self, name: str, items: Iterable[T]) -> Iterator[tuple[T, float]]:
        """Yield the items, each with the seconds that it took to get it, which count towards a part."""
        iterator = iter(items)
        while True:
            with self.part(name) as span:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item, span.seconds

    def totals(self) -> dict[str, float]:
        """Return the seconds of each part until now; their sum is the time since the start."""
        self._switch(self._current)
        return dict(self._seconds)

    def _switch(self, name: str) -> float:
        """Switch to a part; returns its seconds so far."""
        time_now = self._clock()
        self._seconds[self._current] += time_now - self._since
        self._current, self._since = name, time_now
        return self._seconds[name]
