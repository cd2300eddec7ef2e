"""Ctrl-C: the first one ends a command in order, with one line; the second ends it at once. Imports nothing heavy."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

EXIT_CODE = 130
"""Exit code that a shell reports for a command that Ctrl-C ended: 128 + SIGINT."""

OUTCOME = "MEGATRON_LFR_OUTCOME"
"""Environment variable of ranks whose launcher reports for them: the file into which rank 0 writes the exit code."""

_PAUSE = 0.02
"""Seconds to wait for a destructor to end."""

_happened = False


def happened() -> bool:
    """Return whether Ctrl-C has ended this command; whatever has failed since then failed because of it."""
    return _happened


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block at the first Ctrl-C, and let the second end the process at once.

    A process that was started with SIGINT ignored, as a shell's background jobs are, goes on ignoring it.
    """
    global _happened
    if threading.current_thread() is not threading.main_thread() or is_ignored():
        yield
        return
    _happened = False
    hook, before = sys.unraisablehook, signal.signal(signal.SIGINT, _interrupt)
    timers: list[threading.Timer] = []

    def interrupt_again(unraisable: UnraisableHookArgs) -> None:
        """Repeat an interrupt that came during a destructor, which cannot raise it, once the destructor has ended."""
        if unraisable.exc_type is KeyboardInterrupt:
            signal.signal(signal.SIGINT, _interrupt)
            main = threading.main_thread().ident
            timers.append(threading.Timer(_PAUSE, signal.pthread_kill, (main, signal.SIGINT)))
            timers[-1].start()
        else:
            hook(unraisable)

    sys.unraisablehook = interrupt_again
    try:
        yield
    finally:
        for timer in timers:  # the block has ended for another reason
            timer.cancel()
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


def is_ignored() -> bool:
    """Return whether SIGINT is ignored."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def leave_at_next() -> None:
    """Let the next Ctrl-C end the process at once, even inside a call that never comes back to Python."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def not_inherited() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to all processes, from those that are started in the block: their parent
    stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _happened
    _happened = True
    leave_at_next()
    raise KeyboardInterrupt
