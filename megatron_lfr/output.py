"""Standard output and error, whatever they are: a terminal of any width and encoding, a file, a pipe, or nothing."""

from __future__ import annotations

import difflib
import errno
import io
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_UNLIMITED = 100_000
"""Number of columns of a file or a pipe."""
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def prepare() -> None:
    """Make printing safe for a process: characters that the encoding lacks are written as escapes, and output to a pipe
    or terminal that has closed is discarded, so that it does not end a job of days."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # it is closed, and the next file that is opened would become the output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)


class _Lasting(io.FileIO):
    """A file descriptor whose output is discarded once its reader is gone."""

    def write(self, data: ReadableBuffer, /) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno in (errno.EPIPE, errno.EIO):
                return memoryview(data).nbytes
            error.filename = "standard output" if self.fileno() == 1 else "standard error"
            raise  # only once, for instance for a full disk


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # Python found it closed
        return open(descriptor, "w", encoding="utf-8", closefd=False)
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # python -u has no buffer
    if not isinstance(stream, io.TextIOWrapper) or type(raw) is not io.FileIO or raw.fileno() != descriptor:
        return stream  # another object has been installed, for instance to capture the output
    stream.flush()
    lasting = _Lasting(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        lasting if buffer is raw else io.BufferedWriter(lasting),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def visible(text: str, keep: str = "") -> str:
    """Make text from others safe for a terminal or a page: characters that are invisible, or change how others are
    shown, are written as escapes (\\n, \\x1b, \\u202e), except spaces and those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


def did_you_mean(name: str, legal: Collection[str], cutoff: float = 0.6) -> str:
    """Return a hint at the legal names that resemble `name`; empty where none does. cutoff: as in difflib."""
    close = difflib.get_close_matches(name, list(legal), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def is_utf8(text: str) -> bool:
    """Return whether a text from the command line or a folder was UTF-8 there: other bytes become surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def is_number(value: Any) -> bool:
    """Return whether something read from a file is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # an integer may be too large to become a float


def exponent_hint(value: Any) -> str:
    """Return how to write a number that YAML has taken for a text, as it does 1e3; empty where it is none."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return ", a text to YAML: with an exponent, it takes numbers with a point and a sign alone, as 1.0e+3"
    return ""


def number(value: Any, digits: int = 4, missing: str = "-") -> str:
    """Format a loss for readers; `missing` where it is not a finite number."""
    return f"{value:.{digits}f}" if is_number(value) else missing


def width() -> int:
    """Return the number of columns of the output: that of COLUMNS or of the terminal, else practically no limit."""
    return shutil.get_terminal_size((_UNLIMITED, 24)).columns


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, left: Collection[str] | None = None
) -> None:
    """Print a table that is never cut: where it is wider than the output, each row becomes a list.

    The columns named in `left`, by default the first, are text; the others are numbers. What grows with the data
    belongs in rows.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    rows = [[visible(cell) for cell in row] for row in rows]
    table = Table()
    for name in head:
        table.add_column(name, justify="left" if name in (left or head[:1]) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=_UNLIMITED, highlight=False, markup=False, emoji=False)
    console.width = Measurement.get(console, console.options, table).maximum
    if title is not None:
        print(title)
    if console.width <= width():
        console.print(table)
        return
    for row in rows:
        print(row[0])
        for name, cell in zip(head[1:], row[1:], strict=True):
            print(f"  {name}: {cell}")
