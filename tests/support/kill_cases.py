"""Commands that are killed. `kill_all` and `kill_branches` fork one for each of the moments; they run in a process of
their own, since a fork of one that has threads may never end."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_lfr import fileio
from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.cli import main
from megatron_lfr.huggingface.stream import SafetensorsStream
from megatron_lfr.lfr import Journal

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


def assert_killed(arm: Callable[[], None], words: list[str]) -> None:
    """Run a command in a fork that `arm` has prepared; AssertionError where it ends in another way than by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        arm()
        os._exit(main(words))
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), words
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill_all(_: int, run: str, hf: str, output: str) -> None:
    """Convert into `output`, each time to be killed."""
    torch.set_num_threads(1)
    for number, moment in enumerate(MOMENTS):
        for command, source in (("to-hf", ["--run", run]), ("from-hf", ["--input", hf])):
            words = ["convert", command, *source, "--output", str(Path(output, f"{command}-{number}"))]
            assert_killed(functools.partial(die_at, moment), words)


BRANCH_MOMENTS: tuple[tuple[Any, str], ...] = (
    (Journal, "append"),
    (CheckpointStore, "_write_files"),
    (fileio, "fsync_file"),
)
"""What a branch's creation calls when it is killed."""


def kill_branches(_: int, parent: str, step: int, output: str) -> None:
    """Branch off `parent` into `output`/0, 1, ..., each time to be killed."""
    torch.set_num_threads(1)
    for number, (owner, name) in enumerate(BRANCH_MOMENTS):
        words = ["branch", "--from", parent, "--at-step", str(step), "--save", str(Path(output, str(number)))]
        assert_killed(functools.partial(setattr, owner, name, die), [*words, "--lr-schedule", "inherit"])


EXTENSION_MOMENTS = 5
"""Files that an extension puts in place: its log, three files that are replaced, and the log that goes."""


def kill_extensions(_: int, runs: list[str], data_path: list[str]) -> None:
    """Extend each of `runs`, to be killed before it puts its 1st, 2nd, ... file in place."""
    torch.set_num_threads(1)
    for number, run in enumerate(runs):
        words = ["extend", "--run", run, "--data-path", *data_path, "--train-iters", "+8"]
        assert_killed(functools.partial(_die_at_change, number), words)


def _die_at_change(number: int) -> None:
    """Kill this process before the file system's change `number`, from 0, of those that replace or remove a file."""
    left = number

    def armed(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: Path, *rest: Any, **more: Any) -> Any:
            nonlocal left
            if left == 0:
                die()
            left -= 1
            return change(self, *rest, **more)

        return counted

    Path.replace = armed(Path.replace)  # type: ignore[method-assign]
    Path.unlink = armed(Path.unlink)  # type: ignore[method-assign]
