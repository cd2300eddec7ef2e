"""Starts several ranks on this machine for `megatron-lfr train --nproc-per-node N`, with PyTorch's elastic launcher.

For runs over several nodes, and for restarts, use torchrun: `torchrun ... -m megatron_lfr train ...`.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_lfr import interrupt
from megatron_lfr.config import take_option
from megatron_lfr.interrupt import OUTCOME
from megatron_lfr.parallel.launchers import adopt_launcher

STOPPED = 75
"""Exit code of a run that a signal or an exit limit stopped: EX_TEMPFAIL, "try again"."""
_PATIENCE = 600
"""Seconds that ranks have to save and leave before they are killed. PyTorch's default is 30; 2.11 accepts no other."""


def take_nproc_per_node(argv: Sequence[str]) -> tuple[int | None, list[str]]:
    """Take --nproc-per-node from the command line. Returns (ranks to start here, None without the flag; the rest)."""
    value, rest = take_option(argv, "--nproc-per-node")
    if value is None:
        return None, rest
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--nproc-per-node {value}: must be a number of at least 1")
    launcher = adopt_launcher().launcher
    if launcher is not None:
        raise ValueError(f"--nproc-per-node {value}: ranks have been started already ({launcher})")
    return int(value), rest


def exit_code(finished: bool) -> int:
    """Return the exit code of a rank whose run has ended, or was stopped without an error.

    An elastic launcher takes any code but 0 for a failure: it would kill the other ranks and, with --max-restarts,
    restart the run that was to stop. So the launcher's ranks leave with 0, and a file gives `start_ranks` the code.
    """
    code = 0 if finished else STOPPED
    if OUTCOME in os.environ and adopt_launcher().rank == 0:
        Path(os.environ[OUTCOME]).write_text(str(code), encoding="ascii")
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else code


def start_ranks(ranks: int, command: Sequence[str]) -> int:
    """Run `python *command` as `ranks` ranks of this machine. Returns their exit code; 1 where one of them failed, in
    which case the others are stopped and the launcher has printed which one it was. KeyboardInterrupt where Ctrl-C
    ended them before they could save."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    for chatty in ("agent.server.api", "multiprocessing.api"):  # they comment on every signal
        logging.getLogger(f"torch.distributed.elastic.{chatty}").setLevel(logging.ERROR)
    # Without it, each rank would use all cores for its matrices, and torchrun would print a warning.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_PATIENCE))
    # Ranks save when a signal asks them to stop, which the launcher forwards. They have sessions of their own, so that
    # Ctrl-C reaches only the launcher.
    signals = "--signals-to-handle=SIGTERM,SIGHUP,SIGQUIT,SIGUSR1"
    arguments = get_args_parser().parse_args(["--standalone", f"--nproc-per-node={ranks}", signals, *command])

    def forward(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, _leave_at_once)
        raise SignalException("Ctrl-C", sigval=signal.SIGINT)

    if not interrupt.is_ignored():
        signal.signal(signal.SIGINT, forward)
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder, "exit code")
        os.environ[OUTCOME] = str(outcome)
        try:
            run(arguments)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            print(error, flush=True)
            return 1
        except SignalException as stop:
            if not outcome.exists():
                if stop.sigval == signal.SIGINT:
                    raise KeyboardInterrupt from None
                return 128 + stop.sigval
        finally:
            del os.environ[OUTCOME]
        return int(outcome.read_text(encoding="ascii")) if outcome.exists() else 0


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """Kill the ranks at the second Ctrl-C, without waiting for them."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    for child in map(int, children):
        if os.getpgid(child) == child:  # a rank, which leads a session of its own
            os.killpg(child, signal.SIGKILL)
    os._exit(interrupt.EXIT_CODE)
