"""How tests wait: for what must come, not for some seconds. The one limit is for a test that hangs, and far beyond what
the slowest machine takes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

LIMIT = 1800.0
"""Seconds."""


def wait_until(condition: Callable[[], bool], is_running: Callable[[], bool] = lambda: True) -> bool:
    """Wait for `condition`. False where it had not come true when what it waits for ran no more; AssertionError after
    LIMIT."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        ran = is_running()
        if condition():
            return True
        if not ran:
            return False
        time.sleep(0.001)
    raise AssertionError(f"nothing has come in {LIMIT:.0f} s")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, standard output) of a process. One that hangs is killed, with its session if that is its own."""
    try:
        out, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        raise AssertionError(f"still there after {LIMIT:.0f} s: {process.communicate()[0]}") from None
    return process.returncode, out
