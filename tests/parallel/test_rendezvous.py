"""Ranks that meet in a store, some of whose keys are of an earlier start."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed import TCPStore

from megatron_lfr.parallel import rendezvous
from megatron_lfr.parallel.rendezvous import agree_on_session, connect
from support.waiting import LIMIT, wait_until

RANKS = 3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """Start a launcher's store, and set its environment."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(RANKS))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


LONG = timedelta(seconds=LIMIT)


def meet(delays: tuple[float, ...] = (0, 0, 0)) -> list[str]:
    def one(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_session(connect(LONG), rank, RANKS, LONG)

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(one, range(len(delays))))


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("late", range(RANKS))
def test_every_start_has_a_name_of_its_own(late: int) -> None:
    """Whoever comes last, no rank goes on with what an earlier start has left."""
    first, *others = meet()
    assert others == [first] * (RANKS - 1)
    delays = tuple(0.5 if rank == late else 0.0 for rank in range(RANKS))
    second, *others = meet(delays)
    assert others == [second] * (RANKS - 1)
    assert second != first


class _Forgetful:
    """A connection on which the first message that sets a key is lost."""

    def __init__(self) -> None:
        self.store, self.lost = connect(LONG), set[str]()
        self.check, self.get = self.store.check, self.store.get

    def set(self, key: str, value: str) -> None:
        if key in self.lost:
            self.store.set(key, value)
        self.lost.add(key)


@pytest.mark.usefixtures("server")
def test_what_is_lost_on_the_way_to_the_store_is_said_again() -> None:
    for _ in range(2):  # in the second start, every key has the value of the first
        with ThreadPoolExecutor(RANKS) as pool:
            names = set(
                pool.map(lambda rank: agree_on_session(cast(Any, _Forgetful()), rank, RANKS, LONG), range(RANKS))
            )
        assert len(names) == 1


@pytest.mark.usefixtures("server")
def test_missing_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    meet()  # leaves the words of all ranks behind
    store = connect(LONG)
    stale = store.get("confirmed/1")
    failed: list[str] = []

    def wait(rank: int) -> None:
        with pytest.raises(TimeoutError) as error:
            agree_on_session(connect(LONG), rank, RANKS, timedelta(seconds=1))
        failed.append(str(error.value))

    clock, turns = [0.0], Counter[int]()

    def sleep(seconds: float) -> None:
        turns[threading.get_ident()] += 1
        time.sleep(seconds)

    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    threads = [threading.Thread(target=wait, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    wait_until(lambda: store.get("confirmed/1") != stale)
    rank_0 = threads[0].ident
    assert rank_0 is not None
    turn = turns[rank_0]
    wait_until(lambda: turns[rank_0] >= turn + 2)  # it has seen the answer of rank 1
    clock[0] = 2.0
    for thread in threads:
        thread.join()
    assert any("rank 0: no answer from ranks [2]" in message for message in failed)
    assert any("rank 1: no answer from ranks [0]" in message for message in failed)


def test_a_launchers_variables_are_all_needed(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match="MASTER_ADDR, the host of rank 0, is not set"):
        connect(LONG)
