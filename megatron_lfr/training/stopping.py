"""When a run stops before its end: a signal or a limit on any rank, on which all ranks agree."""

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
    """All ranks leave what they were doing together."""


class Stopping:
    """Why this rank is to stop, and whether the run does. group: all ranks, over a backend of the host."""

    def __init__(self, config: TrainingConfig, group: ProcessGroup | None = None) -> None:
        self._config = config
        self._group = group
        self._signal: str | None = None  # set by a handler at any moment
        self._started = time.perf_counter()
        self.reason: str | None = None
        """Set once all ranks know that the run stops."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of signals in the block, and count its minutes."""
        self._started = time.perf_counter()
        watched = [signal.SIGTERM, signal.SIGUSR1, *([] if interrupt.is_ignored() else [signal.SIGINT])]
        before = {number: signal.signal(number, self._note) for number in watched}
        yield
        # Not after an error: where a rank is gone, its launcher stops the others, which have yet to say why they end.
        for number, handler in before.items():
            signal.signal(number, handler)

    def wish(self, done: int | None = None) -> str | None:
        """Why this rank wants to stop, after step `done` where one has just been taken."""
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
        """Begin to agree with all ranks on what follows step `done`, which has yet to be taken: to stop, and to write a
        checkpoint because this one wants it (`save`). The function that is returned waits for the other hosts, but for
        no GPU; it says whether any rank wants a checkpoint, and sets `reason` where one wants to stop. Collective."""
        wish = self.wish(done)
        agreed = ranks.start_any([wish is not None, save], self._group)

        def wait() -> bool:
            stops, saves = agreed()
            if stops:
                self._agree(wish)
            return saves

        return wait

    def look(self) -> None:
        """Between two batches without training: raise StoppedError on all ranks where one wants to stop. Collective."""
        wish = self.wish()
        if ranks.any_rank(wish is not None, self._group):
            self._agree(wish)
            raise StoppedError(self.reason)

    def _agree(self, wish: str | None) -> None:
        self.reason = wish or "another rank was asked to stop"

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            interrupt.leave_at_next()
