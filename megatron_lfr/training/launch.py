"""Several ranks on this machine: what `megatron-lfr train --nproc-per-node N` starts, with PyTorch's elastic launcher.

Runs over several machines, and restarts, are torchrun's: `torchrun ... -m megatron_lfr train ...`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from megatron_lfr.config import take_option


def take_nproc_per_node(argv: Sequence[str]) -> tuple[int | None, list[str]]:
    """(ranks to start here, None without the flag; the command line without it)."""
    value, rest = take_option(argv, "--nproc-per-node")
    if value is None:
        return None, rest
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--nproc-per-node {value}: must be a number of at least 1")
    if "WORLD_SIZE" in os.environ:
        raise ValueError(f"--nproc-per-node {value}: ranks were started already (WORLD_SIZE), by torchrun perhaps")
    return int(value), rest


def launch(ranks: int, command: Sequence[str]) -> int:
    """Run `python *command` as `ranks` ranks of this machine. Returns 0 where they ended or were asked to stop, and 1
    where one of them failed; the others are stopped then, and the launcher has said which one it was."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # Without it, each rank would take all cores for its matrices, and torchrun would say so.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # Ranks save when they are asked to stop; the launcher hands on what asks them to.
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    arguments = get_args_parser().parse_args(["--standalone", f"--nproc-per-node={ranks}", signals, *command])
    try:
        run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        print(error, flush=True)
        return 1
    except SignalException as stop:
        return 0 if stop.sigval in (signal.SIGTERM, signal.SIGUSR1) else 1
    return 0
