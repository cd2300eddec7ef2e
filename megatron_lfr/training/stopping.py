"""Stops a run before its end, at a signal or limit on any rank, when all ranks have agreed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed import ProcessGroup

from megatron_lfr import interrupt
from megatron_lfr.config.training import TrainingConfig
from megatron_lfr.parallel import ranks


class StoppedError(Exception):
    """Raised on all ranks together when they leave what they were doing."""


class Stopping:
    """Knows why this rank should stop, and whether the run does. group: all ranks, over a backend for the host."""

    def __init__(self, config: TrainingConfig, group: ProcessGroup | None = None) -> None:
        self._config = config
        self._group = group
        self._signal: str | None = None  # set by a handler at any moment
        self._started = time.perf_counter()
        self.reason: str | None = None
        """Set once all ranks know that the run stops."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note signals while the block runs, and count its minutes."""
        self._started = time.perf_counter()
        watched = [signal.SIGTERM, signal.SIGUSR1, *([] if interrupt.is_ignored() else [signal.SIGINT])]
        before = {number: signal.signal(number, self._note) for number in watched}
        yield
        # Not after an error: if a rank is gone, the launcher stops the others, which have yet to print why they end.
        for number, handler in before.items():
            signal.signal(number, handler)

    def local_reason(self, done: int | None = None) -> str | None:
        """Return why this rank wants to stop, if it does. done: the step that has just been taken, if one has."""
        config = self._config
        if self._signal is not None:
            return self._signal
        if done is not None and config.exit_interval is not None and done % config.exit_interval == 0:
            return f"--exit-interval {config.exit_interval}"
        minutes = config.exit_duration_in_mins
        if minutes is not None and time.perf_counter() - self._started > 60 * minutes:
            return f"--exit-duration-in-mins {minutes:g}"
        return None

    def ask(self, done: int, save: bool) -> Callable[[], bool]:
        """Begin to agree with all ranks on what follows step `done`, which has yet to be taken: whether to stop, and
        whether to write a checkpoint (`save`: this rank wants one). Returns a function that waits for the other hosts,
        but for no GPU. It returns whether any rank wants a checkpoint, and sets `reason` where one wants to stop.
        Collective."""
        reason = self.local_reason(done)
        agreed = ranks.start_any([reason is not None, save], self._group)

        def wait() -> bool:
            stops, saves = agreed()
            if stops:
                self._agree(reason)
            return saves

        return wait

    def look(self) -> None:
        """Raise StoppedError on all ranks if one wants to stop. For use between batches of evaluations. Collective."""
        reason = self.local_reason()
        if ranks.any_rank(reason is not None, self._group):
            self._agree(reason)
            raise StoppedError(self.reason)

    def _agree(self, local_reason: str | None) -> None:
        self.reason = local_reason or "another rank was asked to stop"

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            interrupt.leave_at_next()
