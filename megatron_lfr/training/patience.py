"""Warns if a run that its launcher stops will not have the time to save."""

from __future__ import annotations

import os
import socket

_RATE = 0.5e9
"""Bytes per second that a rank is assumed to write, hash and sync, until a checkpoint has been measured."""
_TORCHRUN = 30
"""Seconds between torchrun's SIGTERM and its SIGKILL by default."""


class Patience:
    """Compares the time that a checkpoint takes with the time that an elastic launcher gives its ranks to leave.

    asynchronous: another checkpoint may be in flight when the run is asked to stop, and has to be written first.
    """

    def __init__(self, asynchronous: bool) -> None:
        self._checkpoints = 2 if asynchronous else 1
        self._limit = seconds_to_leave()
        self._has_warned = False

    def expect(self, checkpoint_bytes: int, ranks: int) -> str | None:
        """Estimate, before the first step, whether `ranks` ranks can write a checkpoint in time. Returns the warning to
        print; None where they can, or a warning was returned before."""
        return self._compare(checkpoint_bytes / ranks / _RATE, f"at {_RATE / 1e9:g} GB/s a rank, a guess")

    def measured(self, seconds: float) -> str | None:
        """Check a checkpoint that has taken `seconds`. Returns the warning to print the first time that this is too
        long, otherwise None."""
        return self._compare(seconds, "as measured")

    def _compare(self, seconds: float, source: str) -> str | None:
        needed = self._checkpoints * seconds
        if self._has_warned or self._limit is None or needed <= self._limit:
            return None
        self._has_warned = True
        in_flight = ", after one that may be in flight (--async-save)" if self._checkpoints > 1 else ""
        rank = f"kill -USR1 {os.getpid()} on {socket.gethostname()}"
        longer = (
            f"start it with TORCH_ELASTIC_SHUTDOWN_TIMEOUT={round(2 * needed)}, or " if _timeout_is_adjustable() else ""
        )
        return (
            f"a checkpoint takes {seconds:.0f} s ({source}){in_flight}, and the launcher kills its ranks "
            f"{self._limit} s after it was told to stop: work since the previous checkpoint would be lost. To stop "
            f"the run, {longer}signal a rank ({rank}) and not the launcher: all ranks save, and none is killed"
        )


def seconds_to_leave() -> int | None:
    """Return how many seconds an elastic launcher lets its ranks save before it kills them; None without a launcher.

    A --shutdown-timeout in torchrun's command line cannot be seen from here.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    timeout = os.environ.get("PET_SHUTDOWN_TIMEOUT") or os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    return int(timeout) if timeout and _timeout_is_adjustable() else _TORCHRUN


def _timeout_is_adjustable() -> bool:
    """Return whether the launcher of this PyTorch accepts another timeout; 2.11's does not."""
    from torch.distributed.launcher.api import LaunchConfig

    return "shutdown_timeout" in LaunchConfig.__dataclass_fields__
