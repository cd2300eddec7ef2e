"""`megatron-lfr branch`: its flags, and what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_lfr.learning_rate import Decay
from megatron_lfr.lfr import FocusScope
from megatron_lfr.versions.branch import create_branch, find_version
from megatron_lfr.versions.changes import Changed


@dataclass(frozen=True)
class BranchConfig:
    """Begin a run that goes on from a saved step of another one, with its weights, optimizer, curriculum and journal.

    The parent is only read. The branch is an ordinary run folder, which `megatron-lfr train --save` continues.
    """

    parent: Annotated[Path, tyro.conf.arg(name="from")]
    """The parent's run folder (what --save was)."""
    save: Path
    """The branch's run folder, a new one."""
    at_step: int | None = None
    """The step that the branch goes on from; the parent must have a checkpoint of it."""
    version: int | None = None
    """Instead of --at-step: the version of a main path that the branch is, from 1 on. Versions are those of `train
    --versions`, or else the segments of the parent. The branch leaves --branch-share of the version's steps before its
    end, where it ends itself."""
    branch_share: float | None = None
    """With --version: the share of a version's steps that the branch has; by default the main path's, which keeps those
    checkpoints."""
    lr_schedule: Literal["inherit"] | None = None
    """inherit: go on with the parent's learning rate."""
    lr_decay_style: Decay | None = None
    """Instead of --lr-schedule inherit: decay the learning rate from the parent's at the step to --min-lr at the
    branch's end. The parent must not be decaying already."""
    min_lr: float | None = None
    """With --lr-decay-style: the learning rate of the last step (for multi-step, the lowest); by default the parent's
    --min-lr."""
    lr_knee_explore: float | None = None
    """With --lr-decay-style knee: the share of the branch that holds the parent's rate before it falls on a straight
    line; by default the parent's --lr-knee-explore."""
    lr_step_shares: list[float] | None = None
    """With --lr-decay-style multi-step: the shares of the branch after which the rate falls to the next of
    --lr-step-factors; by default the parent's --lr-step-shares."""
    lr_step_factors: list[float] | None = None
    """With --lr-decay-style multi-step: what the parent's rate is multiplied with after each of --lr-step-shares; by
    default the parent's --lr-step-factors. A last factor of 0 ends at --min-lr."""
    train_iters: int | None = None
    """Steps from the parent's beginning to the branch's end; by default as many as the parent's, or with --version the
    version's. Only where the orders of the steps before are the same, as with --lfr-schedule uniform. A branch that
    ends at --at-step is one for `megatron-lfr extend`, which gives it other data."""
    lfr_schedule: str | None = None
    """Phases of the branch: a preset, a YAML file with a list of phases, or such a list itself; by default the
    parent's. They are those of the run (where it was extended, of the segment that the branch ends in) from its
    beginning, of which their shares are, too; what is trained until --at-step must be what they begin with."""
    lfr_scores: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """With --lfr-schedule: numbers for the blocks that its phases use, as NAME=FILE.npy, as in `megatron-lfr train`; by
    default the parent's."""
    lfr_focus_scope: FocusScope | None = None
    """With --lfr-schedule: where its Focus phases look for the hard blocks, as in `megatron-lfr train`; by default as
    in the parent."""

    def validate(self) -> None:
        """ValueError names the flag and the legal values."""
        if (self.at_step is None) == (self.version is None):
            raise ValueError("say where the branch begins: either --at-step or --version")
        if self.branch_share is not None and self.version is None:
            raise ValueError("--branch-share: goes with --version")
        if self.branch_share is not None and not 0 < self.branch_share < 1:
            raise ValueError(f"--branch-share {self.branch_share}: must lie between 0 and 1")
        if (self.lr_schedule is None) == (self.lr_decay_style is None):
            raise ValueError("say how the learning rate goes on: either --lr-schedule inherit or --lr-decay-style")
        style = self.lr_decay_style
        for flag, value, fits, needed in (
            ("--min-lr", self.min_lr, style is not None, ""),
            ("--lr-knee-explore", self.lr_knee_explore, style == "knee", " knee"),
            ("--lr-step-shares", self.lr_step_shares, style == "multi-step", " multi-step"),
            ("--lr-step-factors", self.lr_step_factors, style == "multi-step", " multi-step"),
        ):
            if value is not None and not fits:
                raise ValueError(f"{flag}: goes with --lr-decay-style{needed}")
        for flag, of_schedule in (("--lfr-scores", self.lfr_scores), ("--lfr-focus-scope", self.lfr_focus_scope)):
            if of_schedule and self.lfr_schedule is None:
                raise ValueError(f"{flag}: goes with --lfr-schedule")
        if self.min_lr is not None and not math.isfinite(self.min_lr):
            raise ValueError(f"--min-lr {self.min_lr}: must be a finite number")

    def cut(self) -> tuple[int, int | None]:
        """Return the step that the branch goes on from, and its --train-iters. ValueError where the parent has no such
        version, or the branch no step."""
        step, end = self.at_step, self.train_iters
        if self.version is not None:
            step, version_end = find_version(self.parent, self.version, self.branch_share)
            end = end or version_end
        assert step is not None
        first = step if self.lr_decay_style is None else step + 1
        if end is not None and end < first:
            raise ValueError(f"--train-iters {end}: must be at least {first}, as the branch goes on from step {step}")
        return step, end


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr branch`; returns the exit code."""
    config = tyro.cli(BranchConfig, args=list(argv), prog="megatron-lfr branch")
    config.validate()
    step, train_iters = config.cut()
    changed = Changed(
        decay_style=config.lr_decay_style,
        min_lr=config.min_lr,
        lr_knee_explore=config.lr_knee_explore,
        lr_step_shares=config.lr_step_shares,
        lr_step_factors=config.lr_step_factors,
        train_iters=train_iters,
        lfr_schedule=config.lfr_schedule,
        lfr_scores=config.lfr_scores,
        lfr_focus_scope=config.lfr_focus_scope,
    )
    branch = create_branch(config.parent, step, config.save, changed, config.version)
    tensors = "linked, not copied" if branch.is_linked else "copied"
    name = "a branch" if config.version is None else f"version {config.version}, a branch"
    print(f"{config.save}: {name} of {config.parent} from step {step} of {branch.total_steps} on")
    print(f"  weights and optimizer: {branch.tensor_bytes / 1e9:.2f} GB, {tensors}")
    if branch.rates is not None:
        print(f"  learning rate: {branch.rates[0]:g} at its first step, {branch.rates[1]:g} at its last")
    save, change_folder = config.save, ""
    if branch.started_in not in (None, Path.cwd()):  # where its relative paths lead from
        save, change_folder = save.absolute(), f"cd {branch.started_in} && "
    print(f"  to go on: {change_folder}megatron-lfr train --config {save}/config.yaml --save {save}")
    return 0
