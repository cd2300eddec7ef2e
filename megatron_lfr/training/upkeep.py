"""What every rank does beside training: collecting garbage when all do, and recording a profile of some steps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_lfr.config.training import LoggingConfig, TrainingConfig
from megatron_lfr.parallel import ranks
from megatron_lfr.parallel.spans import listening

AfterStep = Callable[[int], None]
"""Is called on every rank with the number of steps that have been launched."""


@contextmanager
def collecting_together(config: TrainingConfig) -> Iterator[AfterStep]:
    """Collect garbage at the same steps on all ranks during the block, and never in between: a rank that stops to
    collect keeps all others waiting. What exists at the start is not looked at again. A single rank is left to
    Python."""
    if not config.manual_gc or ranks.world_size() == 1:
        yield lambda done: None
        return

    def after_step(done: int) -> None:
        if config.manual_gc_interval and done % config.manual_gc_interval == 0:
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield after_step
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def profiling(config: LoggingConfig, folder: Path, first_step: int) -> Iterator[AfterStep]:
    """Record the steps after --profile-step-start up to --profile-step-end on --profile-ranks with PyTorch's profiler,
    as traces in `folder` for chrome://tracing or Perfetto. first_step: the number of steps that are taken already."""
    if not config.profile or ranks.rank() not in config.profile_ranks:
        yield lambda done: None
        return
    with ExitStack() as recording:

        def after_step(done: int) -> None:
            if done == max(first_step, config.profile_step_start):
                recording.enter_context(_recorded(folder / f"rank_{ranks.rank()}.json.gz"))
            elif done == config.profile_step_end:
                recording.close()

        after_step(first_step)
        yield after_step


@contextmanager
def _recorded(path: Path) -> Iterator[None]:
    """Profile what runs until the end of the block, and write the trace. The parts of steps have their names in it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as recording, listening(record_function):
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    recording.export_chrome_trace(str(path))
    print(f"profile: {path}", flush=True)
