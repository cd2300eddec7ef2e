"""`megatron-lfr train` in a process of its own, to be stopped and killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

from megatron_lfr.cli import main
from support.waiting import LIMIT


def _train(args: list[str], output: str) -> None:
    """Do what a process does that `start` starts."""
    with open(output, "wb", buffering=0) as file:  # noqa: PTH123
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(main(["train", *args]))


class Run:
    """`megatron-lfr train` in a process of its own, from the fork server, which has imported everything."""

    def __init__(self, args: list[str]) -> None:
        handle, self._output = tempfile.mkstemp()
        os.close(handle)
        self._process = multiprocessing.get_context("forkserver").Process(target=_train, args=(args, self._output))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def is_running(self) -> bool:
        return self._process.exitcode is None

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for the end: (exit code, what was printed)."""
        self._process.join(LIMIT)
        assert self._process.exitcode is not None, f"still there after {LIMIT:.0f} s"
        printed = Path(self._output).read_text()
        Path(self._output).unlink()
        return self._process.exitcode, printed
