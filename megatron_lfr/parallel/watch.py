"""Finding out which rank has died.

A rank that dies leaves the others in a collective call that ends, if at all, with a connection error on its neighbours
and a timeout elsewhere. So a thread on each rank increments a key in the launcher's store, the rank's heartbeat, and
rank 0 looks at all of them. The first failure that any rank notices is written to the store, and stops every rank.
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
"""Seconds between two heartbeats."""
_SILENCE = 4.0
"""Seconds without a heartbeat after which a rank counts as dead, once a connection has broken."""


_watches = 0


class RankFailureError(ConnectionError):
    """Another rank has died or failed; the message names it."""


class Watch:
    """Sends this rank's heartbeat, and watches those of the others."""

    def __init__(self, store: Store, failing_store: Store, rank: int, world_size: int, patience: float) -> None:
        """Start the thread. There are two connections to one store, as each serves one call at a time: `store` for the
        thread, `failing_store` for the main thread when it fails. patience: seconds without a heartbeat after which a
        rank counts as dead."""
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
        """Report the error of this rank to all others, so that they stop. Returns the failure of another rank that
        caused it, if there was one."""
        try:
            cause = self._cause(error)
            self._declare(
                self._failing_store, cause or f"rank {self._rank} failed: {describe(error) or type(error).__name__}"
            )
        except (RuntimeError, OSError) as store_error:  # the store ended with the process that hosted it
            if _is_local(error):
                return None
            return _describe_lost_store(store_error)
        return cause

    def _cause(self, error: BaseException) -> str | None:
        if _is_local(error):
            return None
        before, started = self._read_beats(self._failing_store, range(self._world_size)), time.monotonic()
        while time.monotonic() - started < _SILENCE:
            if self._failing_store.check(["failure"]):
                return self._failing_store.get("failure").decode()
            time.sleep(0.1)
        after = self._read_beats(self._failing_store, range(self._world_size))
        silent = [rank for rank in range(self._world_size) if before[rank] == after[rank]]
        return self._describe_silent(self._failing_store, silent, _SILENCE) if silent else None

    def _run(self) -> None:
        try:
            failure = self._watch()
        except (RuntimeError, OSError) as error:
            failure = _describe_lost_store(error)
        # The main thread may wait in a collective call that nothing can interrupt. Or it is ending by itself with a
        # better message, for which there is time.
        if failure is not None and not self._stopped.wait(2 * _SILENCE):
            print(f"megatron-lfr: error: [rank {self._rank}] {failure}", file=sys.stderr, flush=True)
            os._exit(1)

    def _watch(self) -> str | None:
        """Send heartbeats and look for others' until there is a failure to report, or the run has ended."""
        watched = range(self._world_size) if self._rank == 0 else range(1)
        last, now = self._read_beats(self._store, watched), time.monotonic()
        changed = dict.fromkeys(watched, now)
        beat = 0
        while not self._stopped.wait(_INTERVAL):
            beat += 1
            self._store.set(f"beat/{self._rank}", str(beat))
            if self._store.check(["failure"]):
                return self._store.get("failure").decode()
            beats, now = self._read_beats(self._store, watched), time.monotonic()
            for rank in watched:
                if beats[rank] != last[rank]:
                    last[rank], changed[rank] = beats[rank], now
            silent = [rank for rank in watched if now - changed[rank] > self._patience]
            if silent:
                message = self._describe_silent(self._store, silent, self._patience)
                self._declare(self._store, message)
                return message
        return None

    def _read_beats(self, store: Store, ranks: range) -> list[bytes]:
        beats: list[bytes] = store.multi_get([f"beat/{rank}" for rank in ranks])
        return beats

    def _describe_silent(self, store: Store, silent: list[int], seconds: float) -> str:
        names = [f"rank {rank} ({store.get(f'who/{rank}').decode()})" for rank in silent]
        return (
            f"{', '.join(names)} stopped answering {seconds:.0f} s ago or more; it was killed, or its machine is lost"
        )

    def _declare(self, store: Store, message: str) -> None:
        store.compare_set("failure", "", message)  # keeps the first one


def _describe_lost_store(error: BaseException) -> str:
    host = os.environ.get("MASTER_ADDR", "rank 0's machine")
    return f"the launcher's store on {host} is gone ({error}); rank 0 or its machine is, too"


def _is_local(error: BaseException) -> bool:
    """Return whether an error has nothing to do with other ranks; PyTorch's communication raises RuntimeErrors."""
    return not isinstance(error, RuntimeError)


@contextmanager
def watching(patience: float) -> Iterator[None]:
    """Run a block as one of several ranks. If it fails here, the other ranks stop; if another rank caused the failure,
    the error is a RankFailureError that names it."""
    global _watches
    _watches += 1  # a process may run several, one after the other; each has its own name in the store
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
