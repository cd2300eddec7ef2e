"""The file of --deepspeed-config, read and checked by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_lfr.config.deepspeed_keys import KEYS, OFFLOAD_KEYS, ZERO_KEYS, Key, is_off
from megatron_lfr.fileio import describe
from megatron_lfr.output import did_you_mean
from megatron_lfr.run_folder.folder import DEEPSPEED_COPY


@dataclass(frozen=True)
class DeepSpeedConfig:
    """DeepSpeed instead of the native engine."""

    deepspeed: bool = False
    """Train with DeepSpeed's ZeRO, stages 0 to 3, as --deepspeed-config says; needs the deepspeed extra."""
    deepspeed_config: str | None = None
    """With --deepspeed: DeepSpeed's configuration, a JSON file. What it says of the run's settings counts like
    --config; a flag that says something else is an error, and so is a key that is unknown or asks for what is not done
    here."""
    cpu_optimizer: bool = False
    """With --deepspeed: keep the fp32 weights and AdamW's state in the host's memory, and update them there, as
    offload_optimizer does in DeepSpeed's configuration."""

    def __post_init__(self) -> None:
        if self.deepspeed_config:  # the run may be continued from another folder, with the config.yaml that this is in
            object.__setattr__(self, "deepspeed_config", str(Path(self.deepspeed_config).absolute()))

    @cached_property
    def values(self) -> dict[str, Any]:
        """What the file holds; it is read once. Errors as from `read_deepspeed`."""
        assert self.deepspeed_config is not None
        return read_deepspeed(self.deepspeed_config)

    def validate(self) -> None:
        if not self.deepspeed:
            if self.deepspeed_config is not None:
                raise ValueError(f"--deepspeed-config {self.deepspeed_config}: goes with --deepspeed")
            if self.cpu_optimizer:
                raise ValueError("--cpu-optimizer: goes with --deepspeed")
            return
        if self.deepspeed_config is None:
            raise ValueError("--deepspeed: give DeepSpeed's configuration with --deepspeed-config FILE")
        if find_spec("deepspeed") is None:
            raise ValueError("--deepspeed: needs the deepspeed package (pip install 'megatron-lfr[deepspeed]')")


def read_deepspeed(path: str) -> dict[str, Any]:
    """Read the file of --deepspeed-config, in JSON or Hjson (comments and trailing commas). ValueError names what is
    wrong with it: a key twice, unknown keys with those that resemble them, keys that are refused, values of the wrong
    kind."""
    source = f"--deepspeed-config {path}"
    values = _parse(path, source)
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected an object of keys and values")
    problems = []
    for prefix, section, keys in sections(values):
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


def sections(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Key]]]:
    """Yield (prefix of its keys, section, what becomes of its keys)."""
    yield "", values, KEYS
    zero = values.get("zero_optimization", {})
    yield "zero_optimization.", zero, ZERO_KEYS
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(offload, dict) and not is_off(name, offload):
            yield f"zero_optimization.{name}.", offload, OFFLOAD_KEYS


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
