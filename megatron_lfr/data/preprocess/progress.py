"""Shows how far preprocessing is: a bar on a terminal, otherwise a line every few seconds. Both go to stderr."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 5.0
_WIDE = 100
"""Least width of a terminal, in columns, for all parts of the bar."""


class Progress:
    """Counts the documents and tokens of this run, and the bytes done, out of `total_bytes` (None: not known).

    before: the bytes that an earlier run has done.
    """

    def __init__(self, total_bytes: int | None, before: int = 0, enabled: bool = True) -> None:
        self._total = total_bytes
        self._before = self._bytes = before
        self._documents = self._tokens = 0
        self._enabled = enabled
        self._started = self._last_line = time.perf_counter()
        self._bar: RichProgress | None = None
        if enabled and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns >= _WIDE:
            self._bar, self._task = _bar(total_bytes)

    def advance(self, bytes_done: int, documents: int, tokens: int) -> None:
        """Set the bytes done so far, and add to the documents and tokens."""
        self._bytes = bytes_done
        self._documents += documents
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes, state=self._state())
        elif self._enabled and time.perf_counter() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and kind is None:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.perf_counter()
        share = "" if self._total is None else f"{100 * self._bytes / max(self._total, 1):.0f}% | "
        print(f"preprocess: {share}{self._state()}", file=sys.stderr, flush=True)

    def _state(self) -> str:
        speed = (self._bytes - self._before) / 1e6 / max(time.perf_counter() - self._started, 1e-9)
        return f"{self._documents} documents | {self._tokens} tokens | {speed:.1f} MB/s"


def _bar(total_bytes: int | None) -> tuple[RichProgress, TaskID]:
    from rich.console import Console  # only a terminal's bar needs it, logs do not
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[state]}"))
    bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    return bar, bar.add_task("", total=total_bytes, state="")
