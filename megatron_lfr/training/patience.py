"""Whether a run that its launcher stops has the time to save."""

from __future__ import annotations

import os
import socket

_RATE = 0.5e9
"""Bytes a second that a rank is taken to write, hash and sync, until a checkpoint has been measured."""
_TORCHRUN = 30
"""Seconds between torchrun's SIGTERM and its SIGKILL, where nothing else is said."""


class Patience:
    """Compares the time that a checkpoint takes with the time that an elastic launcher gives its ranks to leave.

    asynchronous: another checkpoint may be in flight when the run is to stop, and has to be written first.
    """

    def __init__(self, asynchronous: bool) -> None:
        self._checkpoints = 2 if asynchronous else 1
        self._limit = seconds_to_leave()
        self._is_told = False

    def expect(self, checkpoint_bytes: int, ranks: int) -> str | None:
        """What to say before the first step of a run whose last checkpoint will not be written in time, which `ranks`
        ranks write together."""
        return self._compare(checkpoint_bytes / ranks / _RATE, f"at {_RATE / 1e9:g} GB/s a rank, a guess")

    def measured(self, seconds: float) -> str | None:
        """What to say of a checkpoint that has taken `seconds`, the first time that this is too long."""
        return self._compare(seconds, "as measured")

    def _compare(self, seconds: float, source: str) -> str | None:
        needed = self._checkpoints * seconds
        if self._is_told or self._limit is None or needed <= self._limit:
            return None
        self._is_told = True
        in_flight = ", after one that may be in flight (--async-save)" if self._checkpoints > 1 else ""
        rank = f"kill -USR1 {os.getpid()} on {socket.gethostname()}"
        longer = f"start it with TORCH_ELASTIC_SHUTDOWN_TIMEOUT={round(2 * needed)}, or " if _can_be_told() else ""
        return (
            f"a checkpoint takes {seconds:.0f} s ({source}){in_flight}, and the launcher kills its ranks "
            f"{self._limit} s after it was told to stop: what was done since the one before is lost then. To stop "
            f"the run, {longer}tell a rank ({rank}) and not the launcher: all ranks save, and none is killed"
        )


def seconds_to_leave() -> int | None:
    """How long an elastic launcher lets its ranks save before it kills them; None where there is none.

    A --shutdown-timeout in torchrun's own command line is not seen from here.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    told = os.environ.get("PET_SHUTDOWN_TIMEOUT") or os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    return int(told) if told and _can_be_told() else _TORCHRUN


def _can_be_told() -> bool:
    """Whether this PyTorch's launcher takes another time; 2.11's does not."""
    from torch.distributed.launcher.api import LaunchConfig

    return "shutdown_timeout" in LaunchConfig.__dataclass_fields__
