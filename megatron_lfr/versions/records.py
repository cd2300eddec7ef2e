"""What a branch takes over of its parent's records: the journal and the metrics, up to the cut."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lfr.analysis.replay import PhaseHistory, Run
from megatron_lfr.lfr import Journal, Plan
from megatron_lfr.lfr.journal import JournalReader
from megatron_lfr.lfr.selection import Order
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.run_folder.phase_row import describe_order
from megatron_lfr.run_folder.position import Position


def copy_journal(
    source: JournalReader, target: Path, identity: Mapping[str, Any], plan: Plan, position: Position
) -> str:
    """Write the losses of `source`, which was made as `plan` says, up to `position` into a journal with the facts
    `identity`. Returns their SHA-256 in hexadecimal.

    ValueError where the journal ends before, or holds other losses than those that the checkpoint was written after.
    """
    journal, checksum, digest = Journal(target, identity), 0, hashlib.sha256()
    for planned in plan.phases[: position.phase + 1]:
        count = position.entries if planned.index == position.phase else planned.samples
        source.check_holds(planned.index, count)
        entries = source.read(planned.index)
        assert entries is not None
        journal.begin_phase(planned.index)
        journal.append(entries[:count])
        checksum = zlib.crc32(entries[:count].data, checksum)
        digest.update(entries[:count].astype("<f4", copy=False).data)
        if planned.phase.is_rescored:
            shutil.copyfile(source.scores_path(planned.index), journal.scores_path(planned.index))
    journal.close()
    if checksum != position.checksum:
        raise ValueError(f"{source.folder}: its losses are not those that the checkpoint was written after")
    following = position.phase + 1
    is_complete = position.phase < 0 or position.entries == plan.phases[position.phase].samples
    if is_complete and source.scores_path(following).exists():  # made by the weights of this step
        shutil.copyfile(source.scores_path(following), journal.scores_path(following))
    return digest.hexdigest()


def replay_under(plan: Plan, run: Run, position: Position) -> PhaseHistory:
    """Return the current phase of `run`, whose journal ends at `position`, under another plan. ValueError where one of
    the steps before would have served other blocks."""
    error = ValueError(
        f"--train-iters {plan.total_steps}: the {position.step} steps before would have had other blocks, as phases "
        "and their orders follow the length; it can differ where one Learn without weights is all, as with uniform"
    )
    lengths = [(old.samples, new.samples) for old, new in zip(run.plan.phases, plan.phases, strict=False)]
    before = lengths[: position.phase]
    if (
        len(lengths) <= position.phase
        or any(old != new for old, new in before)
        or lengths[position.phase][1] < position.entries
    ):
        raise error
    histories = zip(run.phases(), dataclasses.replace(run, plan=plan).phases(), strict=True)
    for old, new in histories:
        if not np.array_equal(_served(old, position.step), _served(new, position.step)):
            raise error
    return new


def _served(history: PhaseHistory, step: int) -> Order:
    """Return what a phase serves before `step`."""
    return history.order[: max(0, step - history.planned.first_step) * history.planned.global_batch_size]


def copy_metrics(
    source: RunFolder, target: RunFolder, position: Position, current: PhaseHistory | None, run: Run
) -> int:
    """Write metrics.jsonl up to `position`, and return its length in bytes. current: the phase that goes on under
    another plan, of which the record says how long it is and in which order."""
    source.events(position.metrics_bytes)  # ValueError where the file does not hold them
    with source.metrics_file.open("rb") as file:
        lines = file.read(position.metrics_bytes).splitlines(keepends=True)
    if current is not None:
        lines = [_as_planned(line, current, run) for line in lines]
    target.metrics_file.write_bytes(b"".join(lines))
    return sum(map(len, lines))


def _as_planned(line: bytes, current: PhaseHistory, run: Run) -> bytes:
    row = json.loads(line)
    if row.get("event") != "phase" or row.get("phase") != current.planned.index:
        return line
    sizes = [*run.plan.segments[-1].blend.sizes]
    sizes += [0] * (len(row["draws_by_domain"]) - len(sizes))  # domains that later segments brought
    row |= describe_order(current.planned, current.order, dict(zip(row["draws_by_domain"], sizes, strict=False)))
    return json.dumps(row).encode() + b"\n"
