"""A DeepSpeed configuration file beside a run's own settings: read, compared, filled.

What the file says of the run's settings counts as if a file for --config said it; a flag that says something else is an
error. DeepSpeed is given a configuration of its own, in which nothing is left to its defaults that would change a
result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lfr.config.deepspeed_checks import batch_problems, disagreements, memory_problems, scope_problems
from megatron_lfr.config.deepspeed_given import fill
from megatron_lfr.config.deepspeed_keys import KEYS, OFFLOAD_KEYS, ZERO_KEYS, Key, is_off
from megatron_lfr.config.deepspeed_stated import given, stated_settings
from megatron_lfr.fileio import describe
from megatron_lfr.output import did_you_mean
from megatron_lfr.run_folder.folder import DEEPSPEED_COPY

if TYPE_CHECKING:
    from megatron_lfr.config.run import RunConfig


def read_deepspeed(path: str) -> dict[str, Any]:
    """Read the file of --deepspeed-config, in JSON or Hjson (comments and trailing commas). ValueError names what is
    wrong with it: a key twice, unknown keys with those that resemble them, keys that are refused, values of the wrong
    kind."""
    source = f"--deepspeed-config {path}"
    values = _parse(path, source)
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected an object of keys and values")
    problems = []
    for prefix, section, keys in _sections(values):
        if isinstance(section, dict):
            problems += _key_problems(section, keys, prefix)
        else:
            problems.append(f"{prefix.rstrip('.')}: expected an object of keys and values")
    if problems:
        raise ValueError("\n".join(f"{source}: {problem}" for problem in dict.fromkeys(problems)))
    return values


def _parse(path: str, source: str) -> Any:
    try:
        import hjson
    except ImportError as error:
        raise ValueError(f"--deepspeed-config: {error}; pip install 'megatron-lfr[deepspeed]'") from error
    try:
        return hjson.loads(Path(path).read_text("utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise ValueError(
            f"{source}: {describe(error)}; a run folder keeps a copy of what its run was given: {DEEPSPEED_COPY}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {describe(error)}") from None


def _sections(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Key]]]:
    """Yield (prefix of its keys, section, what becomes of its keys)."""
    yield "", values, KEYS
    zero = values.get("zero_optimization", {})
    yield "zero_optimization.", zero, ZERO_KEYS
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(offload, dict) and not is_off(name, offload):
            yield f"zero_optimization.{name}.", offload, OFFLOAD_KEYS


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
    steps = given(read_deepspeed(config.deepspeed.deepspeed_config), "gradient_accumulation_steps")
    if not isinstance(steps, int):
        return config
    rows = steps * config.training.micro_batch_size * config.parallel.data_parallel_size(ranks)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=rows))


def deepspeed_settings(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return what DeepSpeed is given for a run on `ranks` ranks. ValueError names all that does not fit, a line for
    each."""
    path = config.deepspeed.deepspeed_config
    assert path is not None
    values = read_deepspeed(path)
    source = f"--deepspeed-config {path}"
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
        for prefix, section, keys in _sections(values)
        for name in section
        if keys[name].verdict == "ignored"
    ]
    if (values.get("data_types") or {}).get("grad_accum_dtype") == "bf16":
        notes.append("data_types.grad_accum_dtype bf16: sums of many micro-batches' gradients lose digits")
    return notes


def _key_problems(values: Mapping[str, Any], keys: Mapping[str, Key], prefix: str) -> list[str]:
    problems = []
    for name, value in values.items():
        if name not in keys:
            problems.append(f"unknown key {prefix}{name}{did_you_mean(name, keys)}")
        elif keys[name].verdict == "refused" and not is_off(name, value):
            problems.append(f"{prefix}{name}: refused: {keys[name].reason}")
        elif keys[name].verdict == "passed" and (expected := _expected(keys[name], value)):
            problems.append(f"{prefix}{name} {value!r}: must be {expected}")
    return problems


def _expected(key: Key, value: Any) -> str | None:
    """Return what a value should be; None where it is that."""
    if value in (None, "auto") or key.kind == "any":
        return None
    if key.kind == "flag":
        return None if isinstance(value, bool) else "true or false"
    if key.kind == "section":
        return None if isinstance(value, dict) else "an object of keys and values"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return None if is_number and value >= 0 else "a number of at least 0"


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)} is there twice")
    return values
