"""How far preprocessing is: a bar on a terminal, otherwise a line every few seconds. Both go to stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts bytes, documents and tokens against the bytes of the whole input."""

    def __init__(self, total_bytes: int, enabled: bool = True) -> None:
        self._total = total_bytes
        self._bytes = self._documents = self._tokens = 0
        self._enabled = enabled
        self._started = self._last_line = time.perf_counter()
        self._bar: RichProgress | None = None
        if enabled and sys.stderr.isatty():
            columns = (
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[state]}"),
            )
            self._bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total_bytes, state="")

    def advance(self, n_bytes: int, documents: int, tokens: int) -> None:
        """Note that so much more of the input is done."""
        self._bytes += n_bytes
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
        share = 100 * self._bytes / max(self._total, 1)
        print(f"preprocess: {share:.0f}% | {self._state()}", file=sys.stderr, flush=True)

    def _state(self) -> str:
        speed = self._bytes / 1e6 / max(time.perf_counter() - self._started, 1e-9)
        return f"{self._documents} documents | {self._tokens} tokens | {speed:.1f} MB/s"
