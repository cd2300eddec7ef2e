"""Decides when a run writes a checkpoint, and writes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config.training import CheckpointConfig
from megatron_lfr.engine import Engine
from megatron_lfr.parallel import ranks
from megatron_lfr.training.patience import Patience
from megatron_lfr.training.times import Stopwatch


class Saving:
    """Saves checkpoints by the step and by the clock."""

    def __init__(self, store: CheckpointStore, config: CheckpointConfig, patience: Patience, times: Stopwatch) -> None:
        self._store = store
        self._config = config
        self._patience = patience
        self._times = times
        self.start()

    def start(self) -> None:
        """Count the minutes from now on."""
        self._saved_at = time.perf_counter()

    def is_due(self, done: int) -> bool:
        """Return whether --save-interval asks for a checkpoint after step `done`, or it is one that is retained."""
        interval = self._config.save_interval
        return self._config.retains(done) or (interval is not None and done % interval == 0)

    def is_time(self) -> bool:
        """Return, on rank 0, whether --save-interval-mins asks for a checkpoint; False on other ranks."""
        minutes = self._config.save_interval_mins or math.inf
        return ranks.rank() == 0 and time.perf_counter() - self._saved_at > 60 * minutes

    def save(self, step: int, engine: Engine, state: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint with the engine's tensors and what `state` returns. Collective."""
        self.start()
        with self._times.part("saving") as span:
            self._store.save(step, engine.tensors(), state())
        if not self._store.asynchronous and (note := self._patience.measured(span.seconds)) and ranks.rank() == 0:
            print(note, flush=True)

    def wait(self) -> None:
        """Wait for a checkpoint that is still being written."""
        with self._times.part("saving"):
            self._store.wait()
