"""Conversions that are killed: `kill_all` forks one for each of the moments."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from megatron_lfr import fileio
from megatron_lfr.huggingface.convert import main
from megatron_lfr.huggingface.stream import SafetensorsStream

MOMENTS = ("at the first weight", "at a later weight", "before the folder has its name")


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Kill this process when it comes to `moment`."""
    if moment == MOMENTS[2]:
        fileio.fsync_directory = die  # type: ignore[assignment]
        return
    write, left = SafetensorsStream.write, 0 if moment == MOMENTS[0] else 9

    def counted(self: SafetensorsStream, name: str, tensor: torch.Tensor) -> None:
        nonlocal left
        if left == 0:
            die()
        left -= 1
        write(self, name, tensor)

    SafetensorsStream.write = counted  # type: ignore[method-assign]


def kill_all(_: int, run: str, hf: str, output: str) -> None:
    """Convert into `output`, each time to be killed; AssertionError where a conversion ends in another way."""
    torch.set_num_threads(1)
    for number, moment in enumerate(MOMENTS):
        for command, source in (("to-hf", ["--run", run]), ("from-hf", ["--input", hf])):
            pid = os.fork()
            if pid == 0:
                die_at(moment)
                os._exit(main([command, *source, "--output", str(Path(output, f"{command}-{number}"))]))
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status), (moment, command)
            assert os.WTERMSIG(status) == signal.SIGKILL
