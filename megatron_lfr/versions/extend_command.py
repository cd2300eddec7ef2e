"""`megatron-lfr extend`: its flags, and what it says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from megatron_lfr.lfr import FocusScope
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.versions.extend import Extension, describe, extend_run


@dataclass(frozen=True)
class ExtendConfig:
    """Give a run one more segment, after those that it has: with new blocks, other phases, or another batch size.

    What is trained stays as it is, and so do the ids of the blocks. `megatron-lfr train` goes on with the run.
    """

    run: Path
    """The run folder (what --save was)."""
    data_path: list[str] = field(default_factory=list)
    """All prefixes of the corpus from here on, with or without weights: first the run's own, in its order, then new
    ones. By default the run's own."""
    train_iters: str | None = None
    """Length of the new segment in optimizer steps, as +500, or of the run with it, as 1500. Not needed for a schedule
    whose phases have a length of their own."""
    train_samples: str | None = None
    """Length of the new segment in samples (visits of blocks), as +5000, or of the run with it, instead of
    --train-iters."""
    lfr_schedule: str | None = None
    """Phases of the new segment: a preset, a YAML file with a list of phases, or such a list itself; by default as in
    the segment before. Shares are those of the segment. A Learn that comes first is about the new blocks, if there are
    any, unless it has another scope; all other phases are about all blocks."""
    lfr_scores: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Numbers for all blocks of the new segment, old and new ones, that its phases use, as NAME=FILE.npy, as in
    `megatron-lfr train`; may be given several times. By default those of the segment before, which fit where no block
    is new. Segments before keep the files that they were begun with."""
    replay: float = 0.0
    """Share of the samples of the segment's first phase, where that is about new blocks, that come from the older
    blocks, at random."""
    lfr_focus_scope: FocusScope | None = None
    """Where a Focus phase of the new segment looks for the hard blocks, as in `megatron-lfr train`; by default as in
    the segment before."""
    global_batch_size: int | None = None
    """Blocks of one optimizer step over all ranks in the new segment; by default as in the segment before."""
    override_opt_param_scheduler: bool = False
    """Where the learning rate follows the run's length: take the rate of the new length from here on, though the steps
    before were trained with that of the old one."""


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr extend`; returns the exit code."""
    config = tyro.cli(ExtendConfig, args=list(argv), prog="megatron-lfr extend")
    extension = Extension(
        steps=_length("--train-iters", config.train_iters, config.run),
        samples=_length("--train-samples", config.train_samples, config.run),
        data_path=tuple(config.data_path),
        lfr_schedule=config.lfr_schedule,
        lfr_scores=tuple(config.lfr_scores),
        lfr_focus_scope=config.lfr_focus_scope,
        replay=config.replay,
        global_batch_size=config.global_batch_size,
        override_rate=config.override_opt_param_scheduler,
    )
    extended = extend_run(config.run, extension)
    print(f"{config.run}: extended")
    for line in [*describe(extended), *(f"note: {note}" for note in extended.notes)]:
        print(line)
    print(f"  to go on: megatron-lfr train --config {config.run}/config.yaml --save {config.run}")
    return 0


def _length(flag: str, given: str | None, run: Path) -> int | None:
    """Return the length of the new segment; ValueError names the flag and the legal values."""
    if given is None:
        return None
    if not re.fullmatch(r"\+?[0-9]{1,15}", given):
        raise ValueError(f"{flag} {given}: give the new segment's length as +500, or the run's as 1500")
    length = int(given)
    if not given.startswith("+"):
        plan, _ = RunFolder(run, "--run").plan()
        before = plan.total_steps if flag == "--train-iters" else plan.total_samples
        length -= before
        if length < 1:
            raise ValueError(f"{flag} {given}: must be more than the {before} that the run has")
    if length < 1:
        raise ValueError(f"{flag} {given}: must be at least +1")
    return length
