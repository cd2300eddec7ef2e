"""Processes side by side: order, failures, and how they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_lfr.study.schedule import Ended, Task, run_tasks
from support.waiting import finish, wait_until


def task(folder: Path, name: str, code: str, *needs: str) -> Task:
    return Task(name, ("-c", code), folder / f"{name}.log", needs)


def run(tasks: list[Task], slots: int = 2) -> tuple[list[Ended], list[str]]:
    """Run tasks. Returns how they ended, and their names in the order in which they did."""
    order: list[str] = []
    environments = [{"SLOT": str(slot)} for slot in range(slots)]
    return run_tasks(tasks, slots, environments, lambda end: order.append(end.task.name)), order


def test_a_task_waits_for_those_that_it_needs(tmp_path: Path) -> None:
    wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    tasks = [
        task(tmp_path, "slow", wait),
        task(tmp_path, "after", "print('after')", "slow"),
        task(tmp_path, "free", f"open({str(tmp_path / 'go')!r}, 'w')"),
    ]
    ended, order = run(tasks)
    assert [end.code for end in ended] == [0, 0, 0]
    assert order.index("slow") < order.index("after")
    assert order[0] in ("free", "slow"), "the one that needs nothing did not wait behind the one that does"


def test_a_failure_stops_those_alone_that_need_it(tmp_path: Path) -> None:
    tasks = [
        task(tmp_path, "bad", "import sys; print('why'); sys.exit(3)"),
        task(tmp_path, "next", "", "bad"),
        task(tmp_path, "last", "", "next"),
        task(tmp_path, "good", "import os; print(os.environ['SLOT'])"),
    ]
    ended, _ = run(tasks, slots=1)
    assert [(end.code, end.because) for end in ended] == [(3, None), (1, "bad"), (1, "next"), (0, None)]
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert (tmp_path / "good.log").read_text() == "0\n"
    assert not (tmp_path / "next.log").exists()


STUDY = """
import sys
from pathlib import Path
from megatron_lfr.study.schedule import Task, ending_on_sigterm, run_tasks
code = '''
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("runs", flush=True)
while True: time.sleep(0.05)
'''
with ending_on_sigterm():
    run_tasks([Task("one", ("-c", code), Path(sys.argv[1]))], 1, [{}], print)
"""


def holds(log: Path, text: str) -> bool:
    return log.exists() and text in log.read_text()


def test_sigterm_and_ctrl_c_let_processes_save(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        log = tmp_path / f"{number.name}.log"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-c", STUDY, str(log)], env=environment, stderr=subprocess.PIPE, text=True
        )
        started = wait_until(
            lambda log=log: log.exists() and "runs\n" in log.read_text(), lambda p=process: p.poll() is None
        )
        assert started
        process.send_signal(number)
        finish(process)
        assert log.read_text() == "runs\nsaved\n"
