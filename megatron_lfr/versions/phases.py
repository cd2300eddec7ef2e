"""What a branch trains on: its parent's phases, those over another length, or others.

A new schedule is that of the branch's last segment from that segment's first step on, as if the run had always had it:
shares are of the segment, and what is trained must be what the schedule would have begun with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.build import make_arrays
from megatron_lfr.config import RunConfig
from megatron_lfr.config.run import parse_settings, resolve_schedule
from megatron_lfr.data.corpus.block_values import BlockValues, parse_names
from megatron_lfr.lfr import PRESETS, Phase, Plan, Schedule
from megatron_lfr.lfr.functions import check_functions
from megatron_lfr.lfr.identity import OF_LENGTH, describe_phase
from megatron_lfr.lfr.schedule import with_length
from megatron_lfr.planning import make_plan
from megatron_lfr.run_folder import RunFolder, open_corpus
from megatron_lfr.run_folder.position import Position
from megatron_lfr.run_folder.settings import located
from megatron_lfr.versions.changes import Changed


@dataclass(frozen=True)
class Phases:
    """The plan of a branch, the settings of its last segment that are not its parent's, and for each segment the files
    of --lfr-scores that its phases use."""

    plan: Plan
    settings: dict[str, Any]
    arrays: Sequence[Mapping[str, BlockValues]]


def last_segment(changed: Changed, plan: Plan) -> int:
    """Return the number of segments that a branch has: up to that of its last step, or all of `plan`."""
    end = plan.total_steps if changed.train_iters is None else min(changed.train_iters, plan.total_steps)
    return plan.at_step(end - 1).segment + 1


def change_phases(changed: Changed, folder: RunFolder, step: int, plan: Plan, settings: Mapping[str, Any]) -> Phases:
    """Lay out a branch of the run in `folder`, which has `plan` at the cut, `step`, and `settings` for the branch's
    last segment. ValueError names the flag that asks for what cannot be laid out, or for an array that does not fit."""
    lengths = {"train_iters": changed.train_iters, "train_samples": None, "train_epochs": None}
    if changed.lfr_schedule is None:
        if changed.train_iters is None:
            return Phases(plan, {}, folder.score_files(len(plan.segments)))
        after = with_length(plan, changed.train_iters)
        return Phases(after, lengths, folder.score_files(len(after.segments)))
    schedule = resolve_schedule(changed.lfr_schedule)
    if changed.train_iters is None and schedule.in_shares:
        lengths = {name: settings.get(name) for name in lengths}
        if not any(lengths.values()):  # the parent's phases have a length of their own
            lengths["train_iters"] = plan.total_steps
    new: dict[str, Any] = {"lfr_schedule": _from_anywhere(changed.lfr_schedule), **lengths}
    if changed.lfr_focus_scope is not None:
        new["lfr_focus_scope"] = changed.lfr_focus_scope
    if changed.lfr_scores:
        given = parse_names(changed.lfr_scores, "--lfr-scores")
        new["lfr_scores"] = [f"{name}={path.absolute()}" for name, path in given.items()]
    started_in = folder.history.until(step).started_in
    parent = dict(settings) if started_in is None else located(settings, started_in)
    config = parse_settings(parent | new, str(folder.config_file))
    config.lfr.validate()
    after = _lay_out(config, schedule, folder, plan, last_segment(changed, plan))
    check_functions(after, step)
    corpora = folder.identity()["corpus"][: len(after.segments[-1].blend.sizes)]
    begun = folder.score_files(len(after.segments) - 1)
    return Phases(after, new, make_arrays(config, lambda: corpora, after, begun))


def _from_anywhere(schedule: str) -> str:
    """Return --lfr-schedule with the path of a file in full, since a branch goes on where its parent was started."""
    is_file = schedule not in PRESETS and not schedule.lstrip().startswith("[")
    return str(Path(schedule).absolute()) if is_file else schedule


def _lay_out(config: RunConfig, schedule: Schedule, folder: RunFolder, plan: Plan, segments: int) -> Plan:
    """Return `plan` up to the segment before number `segments`, and that one with the configuration's phases."""
    segment = plan.segments[segments - 1]
    sized = dataclasses.replace(config.training, global_batch_size=segment.global_batch_size)
    names = open_corpus(folder).domains if any(isinstance(phase.scope, tuple) for phase in schedule.phases) else []
    return make_plan(
        dataclasses.replace(config, training=sized),
        segment.n_blocks,
        1,
        dataclasses.replace(segment.blend, focus_scope=config.lfr.lfr_focus_scope),
        plan.first(segments - 1) if segments > 1 else None,
        names[: len(segment.blend.sizes)],
    )


def _value(phase: Phase, field: str) -> object:
    return phase.weighting if field == "weights" else getattr(phase, field)


def check_trained(changed: Changed, before: Plan, after: Plan, position: Position) -> None:
    """Check that the phases up to `position`, which were trained as `before` says, are those of `after`, but for the
    length of the current one. ValueError names the flag, the first phase that differs, and how; the orders of the
    phases are yet to be compared."""
    for old in before.phases[: position.phase + 1]:
        name = f"phase {old.index} ({old.phase.kind})"
        if old.index >= len(after.phases):
            raise ValueError(f"{changed.schedule_flag}: {name} is trained, but the schedule ends before it")
        new = after.phases[old.index]
        was, asked = describe_phase(old.phase), describe_phase(new.phase)
        for field in was | asked:
            if field not in OF_LENGTH and was.get(field) != asked.get(field):
                raise ValueError(
                    f"{changed.schedule_flag}: {name} is trained, with {field} {_value(old.phase, field)}, where the "
                    f"schedule has {_value(new.phase, field)}: a branch's schedule begins as its parent's did"
                )
        if old.corpora != new.corpora:
            raise ValueError(f"{changed.schedule_flag}: {name} is trained, on other prefixes (scope)")
        is_current = old.index == position.phase
        if new.samples < position.entries if is_current else new.samples != old.samples:
            trained = position.entries if is_current else old.samples
            raise ValueError(
                f"{changed.schedule_flag}: {name} is trained, with {trained} samples until step "
                f"{min(position.step, old.end_step)}, where the schedule has {new.samples} (shares are of the "
                f"segment, which ends at step {after.total_steps})"
            )
