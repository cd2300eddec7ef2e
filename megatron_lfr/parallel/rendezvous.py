"""How the ranks of a run find each other, also after a restart.

torchrun restarts the ranks but keeps its store, with the addresses that the dead ranks have left in it (in PyTorch
2.13, gloo then fails with "connection refused"). So the ranks first agree on a name that only they know, and use it as
a prefix in the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import DistNetworkError

from megatron_lfr.parallel.launchers import read_launch

_POLL = 0.05
"""Seconds between two looks at the store."""


def connect(timeout: timedelta) -> TCPStore:
    """Open a new connection to the store of the launcher's ranks; rank 0 hosts the store where no launcher does. Raises
    ValueError where the launcher's variables are wrong, and ConnectionError, which names the store's address, where
    there is no connection."""
    launch = read_launch(os.environ)
    launcher_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts_store = launch.rank == 0 and not launcher_hosts_store
    try:
        return TCPStore(
            launch.address,
            launch.port,
            is_master=hosts_store,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistNetworkError as error:
        problem = "cannot open" if hosts_store else "cannot reach"
        reason = str(error).partition("\n")[0].partition("Exception raised from")[0].strip()
        raise ConnectionError(
            f"rank {launch.rank} on {socket.gethostname()} {problem} the store of all ranks at MASTER_ADDR "
            f"{launch.address}, MASTER_PORT {launch.port}: {reason}"
        ) from None


def agree_on_session(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Agree with all ranks on a name for this start, which no earlier start had.

    Every rank posts a random word. Rank 0 proposes the list of all words until each rank has confirmed that its own is
    in it; words of an earlier start, which may still be in the store, are never confirmed. Raises TimeoutError that
    names the missing ranks.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    mine = uuid.uuid4().hex
    _post(store, f"word/{rank}", mine)
    confirmed: set[int] = set()
    while time.monotonic() < deadline:
        if rank == 0:
            words = [word.decode() for word in _get_all(store, "word", world_size)]
            proposal = json.dumps(words)
            _post(store, "proposal", proposal)
            name = hashlib.sha256(proposal.encode()).hexdigest()
            confirmed = {r for r, word in enumerate(_get_all(store, "confirmed", world_size)) if word.decode() == name}
            if len(confirmed) == world_size - 1:
                _post(store, "session", name)
                return name
        elif store.check(["proposal"]):
            proposal = store.get("proposal").decode()
            name = hashlib.sha256(proposal.encode()).hexdigest()
            words = json.loads(proposal)
            if len(words) == world_size and words[rank] == mine:
                _post(store, f"confirmed/{rank}", name)
                if _get(store, "session").decode() == name:
                    return name
        time.sleep(_POLL)
    missing = sorted(set(range(1, world_size)) - confirmed) if rank == 0 else [0]
    raise TimeoutError(f"rank {rank}: no answer from ranks {missing} in {timeout.total_seconds():.0f} s at the start")


def _post(store: Store, key: str, value: str) -> None:
    """Set a key that no other rank sets, until the store has it: nothing acknowledges TCPStore.set, and one has been
    seen to get lost."""
    store.set(key, value)
    while _get(store, key) != value.encode():
        store.set(key, value)


def _get_all(store: Store, kind: str, world_size: int) -> list[bytes]:
    """Return the values of the keys `kind`/0, `kind`/1, ...; a missing one is empty."""
    return [_get(store, f"{kind}/{rank}") for rank in range(world_size)]


def _get(store: Store, key: str) -> bytes:
    return store.get(key) if store.check([key]) else b""
