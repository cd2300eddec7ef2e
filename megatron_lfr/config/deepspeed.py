"""A DeepSpeed configuration file beside a run's own settings: read, compared, filled.

What the file says of the run's settings counts as if a file for --config said it; a flag that says something else is an
error. DeepSpeed is given a configuration of its own, in which nothing is left to its defaults that would change a
result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_lfr.config.deepspeed_checks import batch_problems, disagreements, memory_problems, scope_problems
from megatron_lfr.config.deepspeed_file import sections
from megatron_lfr.config.deepspeed_given import fill
from megatron_lfr.config.deepspeed_stated import given, stated_settings

if TYPE_CHECKING:
    from megatron_lfr.config.run import RunConfig


def apply_deepspeed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with the settings that the file states."""
    for stated in stated_settings(values):
        section = dataclasses.replace(getattr(config, stated.section), **{stated.field: stated.value})
        config = dataclasses.replace(config, **{stated.section: section})
    return config


def fill_batch(config: RunConfig, ranks: int) -> RunConfig:
    """Return the configuration with the global batch size that gradient_accumulation_steps amounts to on `ranks` ranks,
    where nothing else says it."""
    if not config.deepspeed.deepspeed_config or config.training.global_batch_size is not None:
        return config
    steps = given(config.deepspeed.values, "gradient_accumulation_steps")
    if not isinstance(steps, int):
        return config
    rows = steps * config.training.micro_batch_size * config.parallel.data_parallel_size(ranks)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=rows))


def deepspeed_settings(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return what DeepSpeed is given for a run on `ranks` ranks. ValueError names all that does not fit, a line for
    each."""
    values = config.deepspeed.values
    source = f"--deepspeed-config {config.deepspeed.deepspeed_config}"
    problems = [f"--deepspeed: {problem}" for problem in scope_problems(config)]
    try:
        stated = stated_settings(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    of_the_file = (
        *disagreements(config, stated),
        *batch_problems(values, config, ranks),
        *memory_problems(values, config, ranks),
    )
    problems += [f"{source}: {problem}" for problem in of_the_file]
    if problems:
        raise ValueError("\n".join(problems))
    return fill(values, config)


def effect_notes(values: Mapping[str, Any]) -> list[str]:
    """Return a note on each key of the file that has no effect, or one that a user may not expect."""
    notes = [
        f"{prefix}{name}: no effect, {keys[name].reason}"
        for prefix, section, keys in sections(values)
        for name in section
        if keys[name].verdict == "ignored"
    ]
    if (values.get("data_types") or {}).get("grad_accum_dtype") == "bf16":
        notes.append("data_types.grad_accum_dtype bf16: sums of many micro-batches' gradients lose digits")
    return notes
