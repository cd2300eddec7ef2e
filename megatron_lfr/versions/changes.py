"""What a branch does otherwise than its parent from the cut on: the learning rate, and the length."""

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
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.schedule import with_length


@dataclass(frozen=True)
class Changed:
    """What the command asked for; None each: as the parent. decay_style: a decay from the cut to the end; min_lr, knee
    and steps are settings of it."""

    decay_style: Decay | None = None
    min_lr: float | None = None
    lr_knee_explore: float | None = None
    lr_step_shares: list[float] | None = None
    lr_step_factors: list[float] | None = None
    train_iters: int | None = None

    def shape(self) -> dict[str, Any]:
        """Return the settings of the decay that the command gave."""
        names = ("min_lr", "lr_knee_explore", "lr_step_shares", "lr_step_factors")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def change_plan(changed: Changed, plan: Plan) -> Plan:
    """Return the branch's plan: the parent's, or one that ends at --train-iters. ValueError names the flag where the
    schedule has another length."""
    if changed.train_iters is None:
        return plan
    return with_length(plan, changed.train_iters)


def change_settings(
    changed: Changed, settings: Mapping[str, Any], step: int, before: Plan, after: Plan
) -> dict[str, Any]:
    """Return the branch's settings from `step` on, given the parent's there and the plans of both.

    ValueError where the parent's rate decays or warms up already and a new decay is asked for, or where another length
    would give the steps before another rate.
    """
    new = {**settings, "versions": None, "branch_share": None}  # a branch is no main path itself
    if changed.train_iters is not None:
        new |= {"train_iters": changed.train_iters, "train_samples": None, "train_epochs": None}
        retained = settings.get("save_retain_steps") or []
        new |= {"save_retain_steps": [kept for kept in retained if kept <= after.total_steps]} if retained else {}
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
    _check_past(rate, make_learning_rate(branch, after), step, after)
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


def _check_past(before: LearningRate, after: LearningRate, step: int, plan: Plan) -> None:
    """ValueError where a step before the cut would have had another rate."""
    past = first_difference(before, after, step)
    if past is not None:
        raise ValueError(
            f"--train-iters {plan.total_steps}: the learning rate follows the run's length: step {past + 1}, which is "
            f"trained, would have had {after(past):g} instead of {before(past):g}. Leave the length as it is"
        )
