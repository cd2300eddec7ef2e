"""Saves that are killed: `python -m support.crash_cases FOLDER`, in a process of its own that forks for each of them.

Prints one JSON object: for each scenario, the number of points and the names that kills have left; and what the saves
killed at random had reported.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_lfr.checkpoint import CheckpointStore
from support.checkpoint_samples import save_filled, store_with
from support.waiting import LIMIT

# Iterations that are there before; the iteration that is saved; its fill.
SCENARIOS = {
    "first": ((), 1, 1),
    "next": ((1, 2), 3, 3),
    "again": ((1, 2), 2, 5),
    "over the only one": ((1,), 1, 5),
    "in the background": ((1, 2), 3, 3),
}
KEEP = 2
RANDOM_KILLS = 8
_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def die_before(point: int, save_returned: threading.Event | None) -> None:
    """Kill this process right before its `point`-th change to the file system.

    `save_returned`: other threads alone may change something, and only after this event.
    """
    left = point
    fsync = os.fsync

    def count() -> None:
        nonlocal left
        if save_returned is not None:
            assert threading.current_thread() is not threading.main_thread()
            save_returned.wait()
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            count()

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    os.fsync = counted_fsync  # type: ignore[assignment]  # it raises no audit event
    sys.addaudithook(hook)


def kill_at_each_point(folder: Path, scenario: str) -> int:
    """One folder for each point: `folder`/0, /1, ... Returns how many there are; the last save was not killed."""
    before, iteration, fill = SCENARIOS[scenario]
    template = folder / "template"
    store_with(template, *before, keep=KEEP)
    template.mkdir(parents=True, exist_ok=True)
    point = 0
    while True:
        root = folder / str(point)
        shutil.copytree(template, root)

        def work(root: Path = root, point: int = point) -> None:
            asynchronous = scenario == "in the background"
            store, save_returned = CheckpointStore(root, KEEP, asynchronous=asynchronous), threading.Event()
            die_before(point, save_returned if asynchronous else None)
            save_filled(store, iteration, fill)
            save_returned.set()
            store.wait()

        _, status = os.waitpid(in_child(work), 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return point
        point += 1


def kill_at_random(root: Path) -> list[int]:
    """Kill and continue saves, one after the other. Return the last iteration that was reported before each kill."""
    chance = random.Random(3)
    reported, last = [], 0
    for kill in range(RANDOM_KILLS):
        reader, writer = os.pipe()

        def work(first: int = last + 1, writer: int = writer) -> None:
            iteration = first
            while True:
                save_filled(CheckpointStore(root, KEEP), iteration, iteration)
                os.write(writer, f"{iteration}\n".encode())
                iteration += 1

        pid = in_child(work)
        os.close(writer)
        select.select([reader], [], [], LIMIT)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader) as lines:
            last = int(lines.read().split()[-1])
        reported.append(last)
        shutil.copytree(root, root.with_name(f"{root.name}-{kill}"))
    return reported


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    points = {name: kill_at_each_point(folder / name, name) for name in SCENARIOS}
    reported = kill_at_random(folder / "random")
    left = {name: sorted({path.name for path in (folder / name).glob("*/.*")}) for name in SCENARIOS}
    print(json.dumps({"points": points, "left": left, "reported": reported}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
