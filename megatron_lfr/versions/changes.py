"""What a branch does otherwise than its parent from the cut on: the learning rate, and the length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_lfr.engine.optimizer import LearningRate, OptimizerConfig
from megatron_lfr.engine.rates import describe_other_past
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.schedule import with_length

DecayStyle = Literal["cosine", "linear", "minus_sqrt"]


@dataclass(frozen=True)
class Changed:
    """What the command asked for; None each: as the parent. decay_style: a complete decay from the cut to the end."""

    decay_style: DecayStyle | None = None
    min_lr: float | None = None
    train_iters: int | None = None


def change_plan(changed: Changed, plan: Plan) -> Plan:
    """The branch's plan: the parent's, or one that ends at --train-iters. ValueError names the flag where the schedule
    has another length."""
    if changed.train_iters is None:
        return plan
    return with_length(plan, changed.train_iters)


def change_settings(
    changed: Changed, settings: Mapping[str, Any], step: int, before: Plan, after: Plan
) -> dict[str, Any]:
    """The branch's settings from `step` on, given the parent's there and the plans of both.

    ValueError where the parent's rate decays or warms up already and a new decay is asked for, or where another length
    would give the steps before another rate.
    """
    new = dict(settings)
    if changed.train_iters is not None:
        new |= {"train_iters": changed.train_iters, "train_samples": None, "train_epochs": None}
        retained = settings.get("save_retain_steps") or []
        new |= {"save_retain_steps": [kept for kept in retained if kept <= after.total_steps]} if retained else {}
    parent = _optimizer(settings)
    rate = LearningRate(parent, before.total_steps, before.global_batch_size)
    branch = parent
    if changed.decay_style is not None:
        if step and rate(step - 1) != parent.lr:
            doing = "warms up" if step < rate.warmup else "decays already"
            raise ValueError(
                f"--lr-decay-style {changed.decay_style}: the parent's learning rate {doing} at step {step}, where it "
                f"is {rate(step - 1):g} of --lr {parent.lr:g}; branch off where its rate is constant, or go on with "
                "--lr-schedule inherit"
            )
        branch = _decaying(parent, rate, changed, step, after.total_steps)
        branch.validate()
        new |= {name: value for name, value in dataclasses.asdict(branch).items() if value != getattr(parent, name)}
    _check_past(rate, LearningRate(branch, after.total_steps, after.global_batch_size), step, after)
    return new


def _optimizer(settings: Mapping[str, Any]) -> OptimizerConfig:
    names = [field.name for field in dataclasses.fields(OptimizerConfig)]
    return OptimizerConfig(**{name: settings[name] for name in names if name in settings})


def _decaying(parent: OptimizerConfig, rate: LearningRate, changed: Changed, step: int, end: int) -> OptimizerConfig:
    """The parent's warm-up and peak, held until `step`, and a decay from there to `end`: Megatron-LM's WSD."""
    assert changed.decay_style is not None
    return dataclasses.replace(
        parent,
        min_lr=parent.min_lr if changed.min_lr is None else changed.min_lr,
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
    if problem := describe_other_past(before, after, step):
        raise ValueError(f"--train-iters {plan.total_steps}: {problem}. Leave the length as it is")
