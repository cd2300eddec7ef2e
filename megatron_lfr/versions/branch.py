"""Making a branch: a run folder that goes on from a step of its parent, which is only read.

Everything is put together in a folder beside the branch's, brought to the disk, and renamed: a kill leaves no branch,
and the same command makes it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.analysis.replay import PhaseHistory, Run
from megatron_lfr.checkpoint import Checkpoint, CheckpointStore
from megatron_lfr.checkpoint.manifest import NAME, record_file
from megatron_lfr.data.corpus.block_values import digests_of, numbers
from megatron_lfr.fileio import check_space, new_folder
from megatron_lfr.identity import facts_before
from megatron_lfr.learning_rate import learning_rate_of
from megatron_lfr.lfr.identity import describe_segments
from megatron_lfr.lfr.main_path import MainPath
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.run_folder.lineage import Parent
from megatron_lfr.run_folder.position import read_position
from megatron_lfr.run_folder.settings import OF_SEGMENT, History, located
from megatron_lfr.versions.changes import Changed, change_settings
from megatron_lfr.versions.phases import change_phases, check_trained, last_segment
from megatron_lfr.versions.records import copy_journal, copy_metrics, replay_under
from megatron_lfr.versions.tensors import Tensors

_OF_THE_PARENT = ("WeightsAndBiases",)
"""Callbacks whose state names a record elsewhere that is the parent's: the branch begins one of its own."""


@dataclass(frozen=True)
class Branch:
    """What was made. rates: the learning rates of the branch's first and last step; none where it ends at the cut.
    started_in: the folder that the settings' relative paths lead from; None where not recorded."""

    total_steps: int
    rates: tuple[float, float] | None
    tensor_bytes: int
    is_linked: bool
    started_in: Path | None


def create_branch(parent: Path, step: int, save: Path, changed: Changed, version: int | None = None) -> Branch:
    """Make `save` a run that goes on from step `step` of the run in `parent`. version: its number on a main path, which
    gave the step.

    ValueError or OSError where the parent has no complete checkpoint of that step, the journal is not the one that led
    to it, `save` exists or lies in the parent, the changes would change the past, or the disk is full; then nothing is
    left of `save`.
    """
    folder = RunFolder(parent, "--from")
    _check_target(folder, save)
    flag = f"--at-step {step}" if version is None else f"--version {version}, which leaves after step {step}"
    checkpoint = _find_checkpoint(folder, step, flag)
    position = read_position(checkpoint)
    plan, seed = folder.plan()
    plan = plan.first(folder.history.segments_at(step))
    segments = last_segment(changed, plan)
    settings = _settings_at(folder, step, segments)
    phases = change_phases(changed, folder, step, plan, settings)
    new_plan, is_other = phases.plan, phases.plan is not plan
    check_trained(changed, plan, new_plan, position)
    settings = change_settings(changed, settings | phases.settings, step, plan, new_plan)
    settings |= _of_its_own(settings, save)
    history = _history(folder, settings, step, segments)
    identity = facts_before(folder.identity(), segments)
    if is_other:
        identity["segments"] = describe_segments(new_plan, digests_of(phases.arrays))

    with new_folder(save) as aside:
        new, tensors = RunFolder(aside), Tensors.of(checkpoint, aside)
        losses = 4 * (plan.samples_before(step) + plan.n_blocks)
        check_space("--save", save, losses + position.metrics_bytes + (0 if tensors.are_linked else tensors.bytes))
        digest = copy_journal(folder.journal, new.journal.folder, identity, plan, new_plan, position)
        run, current = Run(new, plan, seed, folder.arrays(len(plan.segments))), None
        if is_other:
            goes_on = Run(new, new_plan, seed, numbers(phases.arrays))
            current = replay_under(goes_on, run, position, changed.schedule_flag)
        metrics_bytes = copy_metrics(folder, new, position, current, run)
        state = _new_state(checkpoint, identity, metrics_bytes, current)
        state["owes_evaluation"] = state.get("owes_evaluation", False) or (
            current is not None and current.is_complete and not _is_evaluated(new, step)
        )
        tensors.save(CheckpointStore(new.checkpoint_folder, keep=None), step, state)
        manifest = record_file(checkpoint.folder / NAME).sha256
        new.write_branch(Parent(str(parent.resolve()), step, manifest, digest, version), settings, history)
    rate, end = learning_rate_of(settings, new_plan), new_plan.total_steps
    rates = (rate(step), rate(end - 1)) if step < end else None
    return Branch(end, rates, tensors.bytes, tensors.are_linked, history.started_in)


def find_version(parent: Path, version: int, branch_share: float | None) -> tuple[int, int | None]:
    """Return (the step after which a version leaves the main path in `parent`, its last step, None for that of the
    plan which the main path had there). branch_share: None for that of the main path. ValueError where the run there is
    no main path, or has no such version."""
    folder = RunFolder(parent, "--from")
    settings, plan = folder.recorded_settings, folder.plan()[0]
    versions, share = settings.get("versions"), branch_share or settings.get("branch_share")
    if share is None:
        raise ValueError(
            f"--version {version}: {parent} is no main path, which `megatron-lfr train --branch-share A` makes; give "
            "--branch-share, or the branch's beginning with --at-step"
        )
    ends = [segment.end_step for segment in plan.segments]
    path = MainPath.ending(ends, share) if versions is None else MainPath.of(plan.total_steps, versions, share)
    leaves, end = path.leaves_after(version), path.ends_after(version)
    planned = plan.first(folder.history.segments_at(leaves)).total_steps
    return leaves, None if end == planned else end


def _check_target(parent: RunFolder, save: Path) -> None:
    if parent.path.resolve() in save.resolve().parents:
        raise ValueError(f"--save {save}: lies in the parent's folder, which stays as it is; name another")
    if save.exists() or save.is_symlink():
        raise ValueError(f"--save {save}: exists already; a branch begins in a new folder")


def _find_checkpoint(parent: RunFolder, step: int, flag: str) -> Checkpoint:
    """Return the parent's checkpoint of `step`, which `flag` asks for. ValueError where there is none, or one of
    weights alone."""
    assert parent.recorded_settings is not None  # ValueError where there is no run
    store = CheckpointStore(parent.checkpoint_folder, keep=None)
    if step not in (saved := store.iterations()):
        legal = ", ".join(map(str, saved)) or "none"
        raise ValueError(
            f"{flag}: {parent.path} has no checkpoint of that step; there are: {legal} (--save-retain-steps "
            "and --save-retain-interval keep those that a branch will need)"
        )
    checkpoint = store.checkpoint(step)
    if "curriculum" not in checkpoint.state:
        raise ValueError(
            f"--from {parent.path}: holds weights alone, no run. Start one from them with --load {parent.path} "
            "--finetune"
        )
    return checkpoint


def _of_its_own(settings: Mapping[str, Any], save: Path) -> dict[str, Any]:
    """Return the settings that would lead the branch into its parent's folders."""
    load = settings.get("load") if settings.get("finetune") else None
    return {"save": str(save), "load": load, "tensorboard_dir": None}


def _settings_at(parent: RunFolder, step: int, segments: int) -> dict[str, Any]:
    """Return the parent's settings at `step`, which describe the last of its first `segments` segments."""
    settings, history = parent.settings_at(step), parent.history.until(step)
    if segments < history.segments_at(step):  # the branch ends before the segments that have come since
        of_its_time = history.of_segments(segments)
        earlier = of_its_time.at(step)
        if (folder := of_its_time.started_in) not in (None, history.started_in):
            earlier = {**earlier, "data_args_path": None, **located(earlier, folder)}
        settings = {**settings, **{name: earlier[name] for name in OF_SEGMENT if name in earlier}}
    return settings


def _history(parent: RunFolder, settings: Mapping[str, Any], step: int, segments: int) -> History:
    """Return the parent's history up to `step`, and what the branch changes there."""
    history = parent.history.until(step)
    if history.started_in is None:  # a run from before histories were kept
        return history
    return history.continued(settings, step, history.started_in, defaults={}, segments=segments)


def _is_evaluated(run: RunFolder, step: int) -> bool:
    return any(event.get("event") == "evaluation" and event.get("step") == step for event in run.events())


def _new_state(
    checkpoint: Checkpoint, identity: Mapping[str, Any], metrics_bytes: int, current: PhaseHistory | None
) -> dict[str, Any]:
    """Return the state of the parent's checkpoint as the branch goes on from it.

    current: the phase under another plan.
    """
    state = {**checkpoint.state, "identity": dict(identity)}
    state["callbacks"] = {name: kept for name, kept in state["callbacks"].items() if name not in _OF_THE_PARENT}
    if "MetricsFile" in state["callbacks"]:
        state["callbacks"]["MetricsFile"] = {**state["callbacks"]["MetricsFile"], "bytes": metrics_bytes}
    if current is not None:
        state["curriculum"] = {**state["curriculum"], "order_hash": f"{current.order_hash:016x}"}
    return state
