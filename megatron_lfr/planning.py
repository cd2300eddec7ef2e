"""Lays out a run: the segments that it has so far, and those that its configuration describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_lfr.config import RunConfig, run_schedule
from megatron_lfr.config.main_path import check_main_path
from megatron_lfr.config.run import weighted_as_preset
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.learning_rate import LearningRate, LearningRateConfig, first_difference, make_learning_rate
from megatron_lfr.lfr import PRESETS, Blend, Phase, Plan, Schedule
from megatron_lfr.lfr.main_path import MainPath
from megatron_lfr.lfr.weights import as_begun
from megatron_lfr.parallel.launchers import adopt_launcher


def make_blend(config: RunConfig, corpus: BlockDataset) -> Blend:
    """Return how the prefixes share the samples."""
    return Blend(corpus.train.domain_starts.tolist(), config.data.corpora()[1], config.lfr.lfr_focus_scope)


def make_plan(
    config: RunConfig,
    n_blocks: int,
    world_size: int | None = None,
    blend: Blend | None = None,
    past: Plan | None = None,
    names: Sequence[str] = (),
    begun: Sequence[Phase] = (),
    at_most: bool = False,
) -> Plan:
    """Lay out the schedule over the corpus for `world_size` ranks (by default as many as have been started).

    past: the segments before. The schedule is then that of one more, and lengths are those of the run to its end.
    names: the domains of the corpus. begun: the phases of this segment in a run that has begun. at_most: the corpus may
    turn out to have fewer blocks.
    """
    lfr = config.lfr
    budgets = _budgets(config, past)
    data_parallel_size = config.parallel.data_parallel_size(world_size or adopt_launcher().world_size)
    try:
        phases = as_begun(run_schedule(lfr).phases, begun, lfr.lfr_schedule in PRESETS)
        return with_replay(Schedule(phases), lfr.replay).plan(
            n_blocks,
            config.data.seq_length,
            config.training.blocks_per_step(data_parallel_size),
            **budgets,
            blend=blend,
            past=past,
            names=names,
            at_most=at_most,
        )
    except ValueError as error:
        if "--" in str(error):  # names the flag already
            raise
        raise ValueError(f"--lfr-schedule {lfr.lfr_schedule}: {error}") from None


def make_run_plan(config: RunConfig, corpus: BlockDataset, stored: Plan | None) -> Plan:
    """Lay out a run. stored: its plan so far, None for a new run. What comes before the last segment stays as it is;
    the flags describe the last one, or one more where they make a run longer that may just go on."""
    blend = make_blend(config, corpus)
    if stored is None:
        return make_new_plan(config, corpus.train.num_blocks, None, blend, corpus.train.domains)
    begun: tuple[Phase, ...] = ()
    past: Plan | None = stored
    if not _just_goes_on(config, blend, stored):
        begun = tuple(planned.phase for planned in stored.segments[-1].phases)
        past = stored.first(len(stored.segments) - 1) if len(stored.segments) > 1 else None
    return make_plan(config, corpus.train.num_blocks, None, blend, past, corpus.train.domains, begun)


def make_new_plan(
    config: RunConfig,
    n_blocks: int,
    world_size: int | None = None,
    blend: Blend | None = None,
    names: Sequence[str] = (),
    at_most: bool = False,
) -> Plan:
    """Lay out a new run, with the segments of --rampup-batch-size before that of the schedule; see `make_plan`."""
    blend = blend or Blend([0, n_blocks])
    past = rampup_plan(config, blend, world_size)
    return make_plan(config, n_blocks, world_size, blend, past, names, at_most=at_most)


def rampup_plan(config: RunConfig, blend: Blend, world_size: int | None = None) -> Plan | None:
    """Lay out the segments of --rampup-batch-size, one Learn for each batch size before the last, as Megatron-LM counts
    them: size k ends with the step that reaches k shares of the samples. None without the flag."""
    training, plan, samples = config.training, None, 0
    if training.rampup_batch_size is None:
        return None
    start, increment, total = training.rampup_batch_size
    end = training.blocks_per_step(config.parallel.data_parallel_size(world_size or adopt_launcher().world_size))
    increments = (end - start) // increment
    for number in range(increments):
        size = start + number * increment
        if (steps := -(-((number + 1) * total - samples * increments) // (increments * size))) > 0:
            learn = Schedule((weighted_as_preset(config.lfr, Phase("learn", steps, "steps", scope="all")),))
            plan = learn.plan(blend.starts[-1], config.data.seq_length, size, blend=blend, past=plan)
            samples += steps * size
    return plan


def fit_to_plan(config: RunConfig, plan: Plan) -> tuple[RunConfig, LearningRate, MainPath | None]:
    """Return the configuration with the branch points among the steps to retain, the learning rate, and the main path;
    None for a run that is none. ValueError where one of them does not fit a run of this length."""
    rate = make_learning_rate(config.optimizer, plan)
    path = config.main_path.lay_out(plan)
    if path is not None:
        check_main_path(path, plan, rate)
        retained = sorted({*config.checkpoint.save_retain_steps, *path.branch_points})
        config = dataclasses.replace(
            config, checkpoint=dataclasses.replace(config.checkpoint, save_retain_steps=retained)
        )
    config.checkpoint.check_retained(plan.total_steps)
    return config, rate, path


def _just_goes_on(config: RunConfig, blend: Blend, stored: Plan) -> bool:
    """Whether a longer --train-iters lengthens a run by a segment: where it ends in one Learn from all blocks, as with
    `uniform`, there is nothing that would have been laid out over the length."""
    steps, last = config.lfr.train_iters, stored.segments[-1]
    phases = tuple(planned.phase for planned in last.phases)
    is_learn = len(phases) == 1 and phases[0].kind == "learn" and last.phases[0].corpora is None
    return (
        steps is not None
        and steps > stored.total_steps
        and config.main_path.versions is None
        and is_learn
        and run_schedule(config.lfr) == Schedule(phases)
        and Schedule(phases).in_shares
        and list(blend.starts) == list(last.blend.starts)
        and (blend.weights, blend.focus_scope) == (last.blend.weights, last.blend.focus_scope)
    )


def describe_rate_change(config: LearningRateConfig, before: Plan, after: Plan, step: int) -> str | None:
    """Say how the learning rate goes on at `step` where the plan `after` gives the steps before another one than the
    plan `before`; None where it does not."""
    old, new = make_learning_rate(config, before), make_learning_rate(config, after)
    past = first_difference(old, new, step)
    if past is None:
        return None
    return (
        f"the learning rate follows the run's length: step {past + 1}, which is trained, would have had {new(past):g} "
        f"instead of {old(past):g}; it would go on at {new(step):g} after {old(step - 1):g}"
    )


def describe_rate_ahead(config: LearningRateConfig, before: Plan, after: Plan) -> str | None:
    """Say where the plan `after` trains on at the end of a decay; None where its rate is another one."""
    rate = make_learning_rate(config, after)
    behind, first, last = (rate(step) for step in (before.total_steps - 1, before.total_steps, after.total_steps - 1))
    if not behind == first == last < config.lr:
        return None
    return (
        f"the learning rate has decayed by step {before.total_steps}, and stays at {first:g}: with another --lr or "
        "--lr-decay-style, train goes on otherwise"
    )


def with_replay(schedule: Schedule, replay: float) -> Schedule:
    """Return a schedule whose first phase replays this share. ValueError where that is a Focus."""
    if not replay:
        return schedule
    first, *others = schedule.phases
    if first.kind == "focus":
        raise ValueError(f"--replay {replay:g}: the schedule begins with a focus phase, which does not replay")
    return Schedule((dataclasses.replace(first, replay=replay), *others))


def _budgets(config: RunConfig, past: Plan | None) -> dict[str, Any]:
    """Return the lengths that are given, less those of the segments before."""
    lfr = config.lfr
    budgets = {"train_iters": lfr.train_iters, "train_samples": lfr.train_samples, "train_epochs": lfr.train_epochs}
    if past is None:
        return budgets
    if lfr.train_epochs is not None:
        raise ValueError(f"--train-epochs {lfr.train_epochs:g}: give --train-iters, as the run has several segments")
    before = {"train_iters": past.total_steps, "train_samples": past.total_samples}
    for name, length in before.items():
        if (given := budgets[name]) is not None:
            if given <= length:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {given}: must be more than the {length} of the segments before the last one")
            budgets[name] = given - length
    return budgets
