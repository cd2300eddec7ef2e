"""What a branch does otherwise than its parent from the cut on, and the learning rate that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lfr.learning_rate import (
    Decay,
    LearningRate,
    LearningRateConfig,
    first_difference,
    learning_rate_of,
    make_learning_rate,
)
from megatron_lfr.lfr import FocusScope, Plan


@dataclass(frozen=True)
class Changed:
    """What the command asked for; None each: as the parent. decay_style: a decay from the cut to the end; min_lr, knee
    and steps are settings of it. lfr_schedule: that of the branch's last segment; lfr_scores and lfr_focus_scope go
    with it."""

    decay_style: Decay | None = None
    min_lr: float | None = None
    lr_knee_explore: float | None = None
    lr_step_shares: list[float] | None = None
    lr_step_factors: list[float] | None = None
    train_iters: int | None = None
    lfr_schedule: str | None = None
    lfr_scores: list[str] | None = None
    lfr_focus_scope: FocusScope | None = None

    @property
    def schedule_flag(self) -> str:
        """The flag that gives the branch other phases than its parent's, and its value."""
        if self.lfr_schedule is not None:
            return f"--lfr-schedule {self.lfr_schedule}"
        return f"--train-iters {self.train_iters}"

    def shape(self) -> dict[str, Any]:
        """Return the settings of the decay that the command gave."""
        names = ("min_lr", "lr_knee_explore", "lr_step_shares", "lr_step_factors")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def change_settings(
    changed: Changed, settings: Mapping[str, Any], step: int, before: Plan, after: Plan
) -> dict[str, Any]:
    """Return the branch's settings from `step` on, given the plans of both, and the parent's settings there with those
    of the branch's phases.

    ValueError where the parent's rate decays or warms up already and a new decay is asked for, or where another length
    would give the steps before another rate.
    """
    new = {**settings, "versions": None, "branch_share": None}  # a branch is no main path itself
    if retained := settings.get("save_retain_steps"):
        new |= {"save_retain_steps": [kept for kept in retained if kept <= after.total_steps]}
    rate = learning_rate_of(settings, before)
    parent = branch = rate.config
    if changed.decay_style is not None:
        if step and rate(step - 1) != parent.lr:
            doing = "warms up" if step < rate.warmup else "decays already"
            raise ValueError(
                f"--lr-decay-style {changed.decay_style}: the parent's learning rate {doing} at step {step}, where it "
                f"is {rate(step - 1):g} of --lr {parent.lr:g}; branch off where its rate is constant, or go on with "
                "--lr-schedule inherit"
            )
        branch = _decaying(rate, changed, step, after.total_steps)
        branch.validate()
        new |= {name: value for name, value in dataclasses.asdict(branch).items() if value != getattr(parent, name)}
    _check_past(changed, rate, make_learning_rate(branch, after), step)
    return new


def _decaying(rate: LearningRate, changed: Changed, step: int, end: int) -> LearningRateConfig:
    """Return the parent's warm-up and peak, held until `step`, and a decay from there to `end`: Megatron-LM's WSD."""
    parent = rate.config
    assert changed.decay_style is not None
    return dataclasses.replace(
        parent,
        **changed.shape(),
        lr_decay_style="WSD",
        lr_decay_iters=end,
        lr_decay_samples=None,
        lr_wsd_decay_style=changed.decay_style,
        lr_wsd_decay_iters=end - step,
        lr_wsd_decay_samples=None,
        lr_warmup_fraction=parent.lr_warmup_fraction and rate.warmup / end,
    )


def _check_past(changed: Changed, before: LearningRate, after: LearningRate, step: int) -> None:
    """ValueError where a step before the cut would have had another rate."""
    past = first_difference(before, after, step)
    if past is not None:
        raise ValueError(
            f"{changed.schedule_flag}: the learning rate follows the run's length: step {past + 1}, which is "
            f"trained, would have had {after(past):g} instead of {before(past):g}. Leave the length as it is"
        )
