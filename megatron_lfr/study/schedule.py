"""Runs processes side by side: as many as there are slots, each once those it needs have ended well."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_lfr import interrupt

STOPPED = 75
"""Exit code of a command that a signal stopped, and that goes on when it is given again."""
_PATIENCE = 60.0
"""Seconds that processes have to save when the study is stopped."""


@dataclass(frozen=True)
class Task:
    """A process to run. needs: names of tasks that must have ended well before. log: the file of its output."""

    name: str
    words: tuple[str, ...]
    log: Path
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A task that has ended: well where `code` is 0; `because`: the task whose failure has kept it from starting."""

    task: Task
    code: int
    because: str | None = None


def run_tasks(
    tasks: Sequence[Task], slots: int, environments: Sequence[dict[str, str]], on_end: Callable[[Ended], None]
) -> list[Ended]:
    """Run all tasks, `slots` at a time, in their order where they can be. environments: that of each slot, over the
    process'. on_end is called as each ends. A failed one ends none but those that need it. Returns how all ended.

    An exception, KeyboardInterrupt among them, ends the processes with SIGTERM, which lets them save, and goes on.
    """
    waiting, ended = list(tasks), dict[str, Ended]()
    running: dict[int, tuple[Task, subprocess.Popen[bytes]]] = {}
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()

    def note(end: Ended) -> None:
        ended[end.task.name] = end
        on_end(end)

    try:
        while waiting or running:
            _drop_hopeless(waiting, ended, note)
            free = [slot for slot in range(slots) if slot not in running]
            ready = [task for task in waiting if not _unmet(task, waiting, running)]
            for slot, task in zip(free, ready, strict=False):
                waiting.remove(task)
                process = _start(task, environments[slot])
                running[slot] = task, process
                threading.Thread(target=_report, args=(process, slot, ends), daemon=True).start()
            if running:
                slot = ends.get()
                task, process = running.pop(slot)
                note(Ended(task, process.returncode))
    finally:
        _stop([process for _, process in running.values()])
    return [ended[task.name] for task in tasks]


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM interrupt the block as Ctrl-C does, so that processes are ended in order."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unmet(task: Task, waiting: list[Task], running: dict[int, tuple[Task, subprocess.Popen[bytes]]]) -> bool:
    open_ = {other.name for other in waiting} | {other.name for other, _ in running.values()}
    return any(need in open_ for need in task.needs)


def _drop_hopeless(waiting: list[Task], ended: dict[str, Ended], note: Callable[[Ended], None]) -> None:
    """Take out the tasks that need one that has failed, and those that need these."""
    for task in list(waiting):
        failed = next((need for need in task.needs if need in ended and ended[need].code), None)
        if failed is not None:
            waiting.remove(task)
            note(Ended(task, 1, failed))


def _start(task: Task, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process of a group of its own, which a terminal's Ctrl-C does not reach: the study ends it."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log, interrupt.not_inherited():
        return subprocess.Popen(
            [sys.executable, *task.words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def _report(process: subprocess.Popen[bytes], slot: int, ends: queue.SimpleQueue[int]) -> None:
    process.wait()
    ends.put(slot)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
