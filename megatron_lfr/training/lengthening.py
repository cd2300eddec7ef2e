"""A run that has begun: what its plan was, and how it gets longer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lfr.config import RunConfig
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.identity import check_old_corpora, recorded_settings
from megatron_lfr.lfr import Plan
from megatron_lfr.parallel.launchers import adopt_launcher
from megatron_lfr.planning import describe_rate_ahead, describe_rate_change
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.start import Start


def stored_plan(folder: RunFolder) -> Plan | None:
    """Return the plan of the run in a folder; None where there is none, or none that can be read: then `find_start`
    says why."""
    try:
        return folder.plan()[0]
    except (ValueError, OSError):
        return None


def check_frozen(config: RunConfig, folder: RunFolder, stored: Plan | None, corpus: BlockDataset) -> None:
    """ValueError where the segments before the last one were made otherwise: by another --rampup-batch-size, or of
    corpora that are not the first of the corpus."""
    if stored is None:
        return
    ramp, was = config.training.rampup_batch_size, folder.settings_at(0).get("rampup_batch_size")
    if ramp != was:
        now, before = (" ".join(map(str, one)) if one else "none" for one in (ramp, was))
        raise ValueError(f"--rampup-batch-size {now}: the run in {folder.path} has {before}")
    if len(stored.segments) > 1:
        kept = len(stored.segments[-2].blend.sizes)
        check_old_corpora(folder.identity()["corpus"][:kept], corpus.digests())


def check_batches(config: RunConfig, plan: Plan, step: int) -> None:
    """ValueError where the batch size of a segment that goes beyond `step` does not fit the layout of the ranks."""
    micro = config.training.micro_batch_size
    ranks = config.parallel.data_parallel_size(adopt_launcher().world_size)
    for size in {segment.global_batch_size for segment in plan.segments if segment.end_step > step}:
        if size % (micro * ranks):
            raise ValueError(
                f"--micro-batch-size {micro} x {ranks} data-parallel ranks: a segment has {size} blocks a step, which "
                f"is no multiple of {micro * ranks}"
            )
        config.parallel.check_batches(config.model.num_layers, config.data.seq_length, micro, size // ranks // micro)


def describe_lengthening(config: RunConfig, stored: Plan | None, plan: Plan, step: int) -> str | None:
    """Say what it means that the run, which has come to `step`, gets longer; None where it does not.

    ValueError where the steps before would have had another learning rate, without --override-opt_param-scheduler.
    """
    if stored is None or len(plan.segments) == len(stored.segments):
        return None
    text = f"--train-iters {plan.total_steps}: the run gets longer, by {plan.total_steps - stored.total_steps} steps"
    if plan.global_batch_size != stored.global_batch_size:
        text += f" of {plan.global_batch_size} blocks each"
    problem = describe_rate_change(config.optimizer, stored, plan, step)
    if problem is None:
        ahead = describe_rate_ahead(config.optimizer, stored, plan)
        return f"{text}; {ahead or 'the learning rate of the steps before is the same'}"
    if not config.optimizer.override_opt_param_scheduler:
        raise ValueError(
            f"{text}, but {problem}. What is trained cannot be trained otherwise: leave the length as it is, or take "
            "the new rate from here on with --override-opt_param-scheduler"
        )
    return f"{text}; {problem} (--override-opt_param-scheduler)"


def write_lengthening(
    config: RunConfig, folder: RunFolder, facts: Mapping[str, Any], start: Start, description: str
) -> None:
    """Give the run its new segment, and say so."""
    print(description, flush=True)
    settings = recorded_settings(config)
    history = folder.history.continued(settings, start.step, Path.cwd(), RunConfig().to_flat(), len(facts["segments"]))
    folder.write_extension(facts, settings, history)
