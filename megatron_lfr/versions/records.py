"""What a branch takes over of its parent's records: the journal and the metrics, up to the cut."""

from __future__ import annotations

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
    source: JournalReader, target: Path, identity: Mapping[str, Any], plan: Plan, after: Plan, position: Position
) -> str:
    """Write the losses of `source`, which was made as `plan` says, up to `position` into a journal with the facts
    `identity`, which goes on as `after` says. Returns their SHA-256 in hexadecimal.

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
        if planned.phase.keeps_scores:
            shutil.copyfile(source.scores_path(planned.index), journal.scores_path(planned.index))
    journal.close()
    if checksum != position.checksum:
        raise ValueError(f"{source.folder}: its losses are not those that the checkpoint was written after")
    if _begins_alike(plan, after, position) and source.scores_path(position.phase + 1).exists():
        shutil.copyfile(source.scores_path(position.phase + 1), journal.scores_path(position.phase + 1))
    return digest.hexdigest()


def _begins_alike(plan: Plan, after: Plan, position: Position) -> bool:
    """Whether a phase begins at `position`, under both plans, whose kept scores would be the same ones: made in the
    same way, of the same blocks, by the weights of this step."""
    ends_here = all(position.entries == one.phases[position.phase].samples for one in (plan, after))
    number = position.phase + 1
    if not ends_here or number >= min(len(plan.phases), len(after.phases)):
        return False
    old, new = plan.phases[number], after.phases[number]
    is_same = (old.phase.kind, old.phase.score) == (new.phase.kind, new.phase.score)
    blocks = plan.segments[old.segment].n_blocks, after.segments[new.segment].n_blocks
    return new.phase.keeps_scores and is_same and blocks[0] == blocks[1]


def replay_under(after: Run, before: Run, position: Position, flag: str) -> PhaseHistory:
    """Return the current phase of a run, whose journal ends at `position`, as it was `before` and as it goes on
    `after`. ValueError begins with `flag` where one of the steps before would have served other blocks."""
    for old, new in zip(before.phases(), after.phases(), strict=True):
        if not np.array_equal(_served(old, position.step), _served(new, position.step)):
            raise ValueError(
                f"{flag}: the {position.step} steps before would have had other blocks, as the order of phase "
                f"{old.planned.index} ({old.planned.phase.kind}) follows its length; it can end elsewhere where it is "
                "a Learn without weights, as with uniform"
            )
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
