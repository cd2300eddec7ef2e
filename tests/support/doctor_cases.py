"""`megatron-lfr doctor` on ranks of a node each, with faults planted on some of them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_lfr.cli import main as run_command
from megatron_lfr.doctor import clock, local, network

NODES = 4
Patch = Callable[[Any, str, Any], Any]
Plant = Callable[[int, Patch], None]


def other_torch(rank: int, patch: Patch) -> None:
    version = metadata.version
    if rank == 2:
        patch(metadata, "version", lambda name: "1.13.1" if name == "torch" else version(name))


def other_code(rank: int, patch: Patch) -> None:
    if rank == 3:
        patch(local, "_code", lambda: "0123456789ab")


def without_a_package(rank: int, patch: Patch) -> None:
    def version(name: str) -> str:
        if name == "numpy" and rank > 0:
            raise metadata.PackageNotFoundError
        return "1.0"

    patch(metadata, "version", version)


def skewed_clock(rank: int, patch: Patch) -> None:
    if rank == 1:
        late = mock.Mock(wraps=time)
        late.time = lambda: time.time() - 90
        patch(clock, "time", late)


def other_interface(rank: int, patch: Patch) -> None:
    if rank == 1:
        os.environ["NCCL_SOCKET_IFNAME"] = "no_such,^no"


def no_locks(rank: int, patch: Patch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if rank == 2:
        patch(fcntl, "flock", flock)


def locks_of_one_node(rank: int, patch: Patch) -> None:
    """As with the mount option localflock: processes of other machines do not see this one's locks."""
    holders: dict[tuple[int, int], int] = {}

    def flock(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        status = os.fstat(descriptor)
        if holders.setdefault((status.st_dev, status.st_ino), descriptor) != descriptor:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")

    if rank == 3:
        patch(fcntl, "flock", flock)


def fails(name: str) -> Callable[..., Any]:
    def function(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EIO, f"planted in {name}")

    return function


def no_rename(rank: int, patch: Patch) -> None:
    if rank == 0:
        patch(os, "replace", fails("rename"))


def no_fsync(rank: int, patch: Patch) -> None:
    fsync = os.fsync

    def of_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            fails("fsync")()
        fsync(descriptor)

    if rank == 1:
        patch(os, "fsync", of_files)


def no_mmap(rank: int, patch: Patch) -> None:
    if rank == 3:
        patch(np, "load", fails("mmap"))


def nothing(rank: int, patch: Patch) -> None:
    """Leave an allocation healthy."""


def folders_of_their_own(rank: int, patch: Patch) -> None:
    """See `main`, which gives each rank another folder."""


CASES: dict[str, list[Plant]] = {
    "nothing": [nothing],
    "ranks": [other_torch, other_code, skewed_clock, other_interface],
    "abilities": [no_locks, no_rename, no_fsync, no_mmap],
    "locks": [locks_of_one_node],
    "folders": [folders_of_their_own, without_a_package],
}
"""Name → what is planted."""
SLOW: dict[str, set[tuple[int, int]]] = {"ranks": {(0, 2), (1, 2), (2, 3)}, "locks": {(0, 1)}}
"""Name → pairs of nodes that take 100 times as long."""


class Link:
    """All-reduces that take as long as is said, on a clock of their own: the machine's own speed depends on who else
    uses it."""

    def __init__(self, slow: set[tuple[int, int]]) -> None:
        self._slow = slow
        self._now = 0.0

    def perf_counter(self) -> float:
        return self._now

    def all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        dist.all_reduce(tensor, group=group)
        a, b = dist.get_process_group_ranks(group)
        self._now += 0.4 if (min(a, b), max(a, b)) in self._slow else 0.004


def main(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    printed = {}
    for name in (*CASES, "measured"):
        environment = {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": NODES, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in environment.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo", COLUMNS="200")
        os.environ.pop("NCCL_SOCKET_IFNAME", None)
        folder = Path(out, f"run{rank}" if name == "folders" else "run")
        folder.mkdir(exist_ok=True)
        with ExitStack() as stack:

            def patch(target: Any, attribute: str, value: Any, stack: ExitStack = stack) -> None:
                stack.enter_context(mock.patch.object(target, attribute, value))

            patch(socket, "gethostname", lambda: f"node{rank}")
            if name != "measured":
                link = Link(SLOW.get(name, set()))
                patch(network, "all_reduce", link.all_reduce)
                patch(network, "time", link)
            for plant in CASES.get(name, []):
                plant(rank, patch)
            said = stack.enter_context(redirect_stdout(StringIO()))
            code = run_command(["doctor", "--save", str(folder), "--distributed-backend", "gloo"])
        printed[name] = {"code": code, "said": said.getvalue(), "left": sorted(path.name for path in folder.iterdir())}
    Path(out, f"{rank}.json").write_text(json.dumps(printed))
