"""Finding out which rank is gone.

A rank that dies leaves the others in a collective call that ends, if at all, with a connection's error on its
neighbours and a time-out elsewhere. So each rank's thread counts up a key in the launcher's store; rank 0 looks at all
of them. The first failure that anyone notices is written to the store, and every rank stops with it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_lfr.fileio import describe
from megatron_lfr.parallel.groups import session_store

_INTERVAL = 1.0
"""Seconds between two beats."""
_SILENCE = 4.0
"""Seconds without a beat after which a rank counts as gone where a connection has broken already."""


_watches = 0


class RankFailureError(ConnectionError):
    """Another rank is gone, or has failed; the message names it."""


class Watch:
    """The beats of all ranks."""

    def __init__(self, store: Store, failing_store: Store, rank: int, world_size: int, patience: float) -> None:
        """Two connections to one store, as each serves one call at a time: for the thread, and for whoever fails.
        patience: seconds without a beat after which a rank is given up."""
        self._store, self._failing_store = store, failing_store
        self._rank, self._world_size, self._patience = rank, world_size, patience
        self._store.set(f"who/{rank}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._store.set(f"beat/{rank}", "0")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="megatron_lfr watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def explain(self, error: BaseException) -> str | None:
        """Called by a rank that fails, with what it failed of: tells all others to stop. Returns the failure of another
        rank that caused it, where there was one."""
        try:
            cause = self._cause(error)
            self._declare(
                self._failing_store, cause or f"rank {self._rank} failed: {describe(error) or type(error).__name__}"
            )
        except (RuntimeError, OSError) as lost:  # the store went with the process that kept it
            return None if _is_own(error) else f"the launcher's store is gone ({lost}); rank 0 or its machine is, too"
        return cause

    def _cause(self, error: BaseException) -> str | None:
        if _is_own(error):
            return None
        before, started = self._beats(self._failing_store, range(self._world_size)), time.monotonic()
        while time.monotonic() - started < _SILENCE:
            if self._failing_store.check(["failure"]):
                return self._failing_store.get("failure").decode()
            time.sleep(0.1)
        after = self._beats(self._failing_store, range(self._world_size))
        silent = [rank for rank in range(self._world_size) if before[rank] == after[rank]]
        return self._gone(self._failing_store, silent, _SILENCE) if silent else None

    def _run(self) -> None:
        try:
            failure = self._watch()
        except (RuntimeError, OSError) as error:
            failure = f"the launcher's store is gone ({error}); rank 0 or its machine is, too"
        # The main thread may wait in a collective call that nothing can interrupt; or be on its way out itself, with
        # more to say.
        if failure is not None and not self._stopped.wait(2 * _SILENCE):
            print(f"megatron-lfr train: error: [rank {self._rank}] {failure}", file=sys.stderr, flush=True)
            os._exit(1)

    def _watch(self) -> str | None:
        """Beat and look until there is a failure to tell, or the run has ended."""
        watched = range(self._world_size) if self._rank == 0 else range(1)
        last, now = self._beats(self._store, watched), time.monotonic()
        changed = dict.fromkeys(watched, now)
        beat = 0
        while not self._stopped.wait(_INTERVAL):
            beat += 1
            self._store.set(f"beat/{self._rank}", str(beat))
            if self._store.check(["failure"]):
                return self._store.get("failure").decode()
            beats, now = self._beats(self._store, watched), time.monotonic()
            for rank in watched:
                if beats[rank] != last[rank]:
                    last[rank], changed[rank] = beats[rank], now
            silent = [rank for rank in watched if now - changed[rank] > self._patience]
            if silent:
                message = self._gone(self._store, silent, self._patience)
                self._declare(self._store, message)
                return message
        return None

    def _beats(self, store: Store, ranks: range) -> list[bytes]:
        beats: list[bytes] = store.multi_get([f"beat/{rank}" for rank in ranks])
        return beats

    def _gone(self, store: Store, silent: list[int], seconds: float) -> str:
        names = [f"rank {rank} ({store.get(f'who/{rank}').decode()})" for rank in silent]
        return (
            f"{', '.join(names)} stopped answering {seconds:.0f} s ago or more; it was killed, or its machine is lost"
        )

    def _declare(self, store: Store, message: str) -> None:
        store.compare_set("failure", "", message)  # the first one stands


def _is_own(error: BaseException) -> bool:
    """Whether an error has nothing to do with other ranks: PyTorch's communication raises RuntimeErrors."""
    return not isinstance(error, RuntimeError)


@contextmanager
def watching(patience: float) -> Iterator[None]:
    """Run a block as one of several ranks: if it fails here, the others stop; if another rank caused that, the error
    is a RankFailureError that names it."""
    global _watches
    _watches += 1  # a process may run one after the other; each has a name of its own in the store
    stores = [session_store(timedelta(seconds=patience)) for _ in range(2)]
    if stores[0] is None or stores[1] is None:
        yield
        return
    one, other = (PrefixStore(f"watch {_watches}", store) for store in stores if store is not None)
    watch = Watch(one, other, dist.get_rank(), dist.get_world_size(), patience)
    try:
        yield
    except BaseException as error:
        cause = watch.explain(error)
        watch.stop()
        if cause is not None:
            raise RankFailureError(cause) from error
        raise
    watch.stop()
