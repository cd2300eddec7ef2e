"""Ranks that meet in a store, some of whose keys are of an earlier start."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megatron_lfr.parallel.rendezvous import agree_on_session, connect

RANKS = 3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """A launcher's store, and its environment."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(RANKS))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def meet(delays: tuple[float, ...] = (0, 0, 0), seconds: float = 20) -> list[str]:
    def one(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_session(connect(timedelta(seconds=5)), rank, RANKS, timedelta(seconds=seconds))

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


@pytest.mark.usefixtures("server")
def test_missing_ranks_are_named() -> None:
    meet()  # leaves the words of all ranks behind
    failed: list[str] = []

    def wait(rank: int) -> None:
        with pytest.raises(TimeoutError) as error:
            agree_on_session(connect(timedelta(seconds=5)), rank, RANKS, timedelta(seconds=1))
        failed.append(str(error.value))

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any("rank 0: no answer from ranks [2]" in message for message in failed)
    assert any("rank 1: no answer from ranks [0]" in message for message in failed)


def test_a_launchers_variables_are_all_needed(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        connect(timedelta(seconds=1))
