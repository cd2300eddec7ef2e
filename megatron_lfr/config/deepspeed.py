"""A DeepSpeed configuration file beside a run's own settings: read, compared, filled.

What the file says of the run's settings counts as if a file for --config said it; a flag that says something else is an
error. DeepSpeed is given a configuration of its own, in which nothing is left to its defaults that would change a
result.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lfr.config.deepspeed_keys import KEYS, ZERO_KEYS, Key, is_off
from megatron_lfr.fileio import describe

if TYPE_CHECKING:
    from megatron_lfr.config.run import RunConfig

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
"""--data-parallel-sharding-strategy by stage of ZeRO."""
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Stated:
    """What the file says of a setting of the run."""

    key: str
    section: str
    field: str
    value: Any


def read_deepspeed(path: str) -> dict[str, Any]:
    """The file of --deepspeed-config, in JSON or Hjson (comments and trailing commas). ValueError names what is wrong
    with it: a key twice, unknown keys with those that resemble them, and keys that are refused."""
    try:
        import hjson
    except ImportError as error:
        raise ValueError(f"--deepspeed-config: {error}; pip install 'megatron-lfr[deepspeed]'") from error
    source = f"--deepspeed-config {path}"
    try:
        values = hjson.loads(Path(path).read_text("utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: {describe(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected an object of keys and values")
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"{source}: zero_optimization: expected an object of keys and values")
    problems = [*_key_problems(values, KEYS, ""), *_key_problems(zero, ZERO_KEYS, "zero_optimization.")]
    if problems:
        raise ValueError("\n".join(f"{source}: {problem}" for problem in problems))
    return values


def apply_deepspeed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with the settings that the file states."""
    for stated in stated_settings(values):
        section = dataclasses.replace(getattr(config, stated.section), **{stated.field: stated.value})
        config = dataclasses.replace(config, **{stated.section: section})
    return config


def fill_batch(config: RunConfig, ranks: int) -> RunConfig:
    """The configuration with the global batch size that gradient_accumulation_steps amounts to on `ranks` ranks, where
    nothing else says it."""
    if not config.deepspeed.deepspeed_config or config.training.global_batch_size is not None:
        return config
    steps = _given(read_deepspeed(config.deepspeed.deepspeed_config), "gradient_accumulation_steps")
    if not isinstance(steps, int):
        return config
    rows = steps * config.training.micro_batch_size * config.parallel.data_parallel_size(ranks)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=rows))


def deepspeed_settings(config: RunConfig, ranks: int) -> dict[str, Any]:
    """What DeepSpeed is given for a run on `ranks` ranks. ValueError names all that does not fit, a line for each."""
    path = config.deepspeed.deepspeed_config
    assert path is not None
    values = read_deepspeed(path)
    source = f"--deepspeed-config {path}"
    problems = [f"--deepspeed: {problem}" for problem in _scope_problems(config)]
    try:
        stated = stated_settings(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    problems += [f"{source}: {problem}" for problem in _disagreements(config, stated)]
    problems += [f"{source}: {problem}" for problem in _batch_problems(values, config, ranks)]
    if problems:
        raise ValueError("\n".join(problems))
    return _filled(values, config)


def ignored_keys(values: Mapping[str, Any]) -> list[str]:
    """A note on each key of the file that has no effect."""
    entries = [(name, KEYS[name]) for name in values]
    entries += [(f"zero_optimization.{name}", ZERO_KEYS[name]) for name in values.get("zero_optimization", {})]
    return [f"{name}: no effect, {key.reason}" for name, key in entries if key.verdict == "ignored"]


def stated_settings(values: Mapping[str, Any]) -> list[Stated]:
    """The settings that the file gives a value; "auto" gives none. ValueError for a value of the wrong kind."""
    found = []
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"zero_optimization.stage {stage!r}: must be 0, 1, 2 or 3")
    found.append(
        Stated("zero_optimization.stage", "parallel", "data_parallel_sharding_strategy", STRATEGIES[int(stage)])
    )
    for name in _BATCH:
        size = _given(values, name)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name} {size!r}: must be a number of at least 1, or auto")
    for name, field in (("train_batch_size", "global_batch_size"), (_BATCH[1], "micro_batch_size")):
        if (size := _given(values, name)) is not None:
            found.append(Stated(name, "training", field, size))
    if (clip := _given(values, "gradient_clipping")) is not None:
        found.append(Stated("gradient_clipping", "optimizer", "clip_grad", _number("gradient_clipping", clip)))
    return [*found, *_stated_precision(values), *_stated_optimizer(values)]


def _stated_precision(values: Mapping[str, Any]) -> list[Stated]:
    found = []
    for name in ("bf16", "bfloat16"):
        section = values.get(name, {})
        if not isinstance(section, dict):
            raise ValueError(f"{name}: expected an object of keys and values")
        if others := [key for key, value in section.items() if key != "enabled" and not is_off(key, value)]:
            raise ValueError(f"{name}.{others[0]}: refused: weights, gradients and the optimizer's state are fp32")
        enabled = _given(section, "enabled")
        if enabled is not None:
            if not isinstance(enabled, bool):
                raise ValueError(f"{name}.enabled {enabled!r}: must be true, false or auto")
            found.append(Stated(f"{name}.enabled", "training", "bf16", enabled))
    return found


def _stated_optimizer(values: Mapping[str, Any]) -> list[Stated]:
    section = values.get("optimizer")
    if section is None:
        return []
    if not isinstance(section, dict) or not isinstance(section.get("params", {}), dict):
        raise ValueError("optimizer: expected an object with type and params")
    if str(section.get("type", "")).lower() not in ("adam", "adamw"):
        raise ValueError(f"optimizer.type {section.get('type')!r}: must be Adam or AdamW, both of which are AdamW")
    found = []
    for name, value in section.get("params", {}).items():
        key = f"optimizer.params.{name}"
        if value == "auto" or (name in ("torch_adam", "adam_w_mode", "bias_correction", "fused") and value is True):
            continue
        if name == "betas":
            if not isinstance(value, list) or len(value) != 2:
                raise ValueError(f"{key} {value!r}: must be two numbers")
            found += [
                Stated(key, "optimizer", f"adam_beta{number}", _number(key, beta))
                for number, beta in enumerate(value, 1)
            ]
        elif name in ("lr", "eps", "weight_decay"):
            field = "adam_eps" if name == "eps" else name
            found.append(Stated(key, "optimizer", field, _number(key, value)))
        elif not is_off(name, value) or name in ("torch_adam", "adam_w_mode", "bias_correction"):
            raise ValueError(f"{key} {value!r}: refused: AdamW has lr, betas, eps and weight_decay")
    return found


def _disagreements(config: RunConfig, stated: Sequence[Stated]) -> list[str]:
    problems = []
    for setting in stated:
        if setting.key in _BATCH:
            continue  # of which all are told at once
        sharding = setting.field == "data_parallel_sharding_strategy"
        ours = config.parallel.sharding if sharding else getattr(getattr(config, setting.section), setting.field)
        if ours != setting.value:
            flag = f"--{setting.field.replace('_', '-')}"
            problems.append(f"{setting.key} stands for {flag} {setting.value}, and the run has {flag} {ours}")
    return problems


def _batch_problems(values: Mapping[str, Any], config: RunConfig, ranks: int) -> list[str]:
    """One message on all three numbers where any of them disagrees."""
    micro, data_parallel_size = config.training.micro_batch_size, config.parallel.data_parallel_size(ranks)
    total = config.training.blocks_per_step(data_parallel_size)
    ours = dict(zip(_BATCH, (total, micro, total / (micro * data_parallel_size)), strict=True))
    given = {name: size for name in _BATCH if (size := _given(values, name)) is not None}
    if all(size == ours[name] for name, size in given.items()):
        return []
    says = ", ".join(f"{name} {size}" for name, size in given.items())
    return [
        f"{says}: do not fit. train_batch_size must be train_micro_batch_size_per_gpu x gradient_accumulation_steps x "
        f"data-parallel ranks, and the run has --global-batch-size {total} = --micro-batch-size {micro} x "
        f"{ours[_BATCH[2]]:g} x {data_parallel_size} ranks; correct one of them, or write auto"
    ]


def _scope_problems(config: RunConfig) -> list[str]:
    """What the engine for DeepSpeed does not do."""
    layout, problems = config.parallel, []
    if layout.pipeline_model_parallel_size > 1:
        problems.append(
            f"--pipeline-model-parallel-size {layout.pipeline_model_parallel_size} is refused; the native engine runs "
            "pipelines with ZeRO-1: drop --deepspeed, add --data-parallel-sharding-strategy optim"
        )
    for flag, value, legal in (
        ("--num-distributed-optimizer-instances", layout.num_distributed_optimizer_instances, 1),
        ("--compile", config.training.compile, False),
        ("--layer-kernels", config.training.layer_kernels, "torch"),
        ("--adam-kernel", config.optimizer.adam_kernel, "torch"),
    ):
        if value != legal:
            given = flag if value is True else f"{flag} {value}"
            problems.append(f"{given} is not supported with it yet; the native engine has it: drop --deepspeed")
    return problems


def _filled(values: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    stage = STRATEGIES.index(config.parallel.sharding)
    hidden = config.model.hidden_size
    automatic = {  # as Hugging Face's Trainer fills them
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    zero: dict[str, Any] = {"stage": stage}
    for name, value in values.get("zero_optimization", {}).items():
        if ZERO_KEYS[name].verdict == "passed":
            if value != "auto":
                zero[name] = int(value) if isinstance(value, float) else value
            elif name in automatic:
                zero[name] = automatic[name]
    passed = {name: value for name, value in values.items() if KEYS[name].verdict == "passed" and value != "auto"}
    return {
        "steps_per_print": None,  # its own lines would be between the run's
        **passed,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        # Of no effect, as the engine says which micro-batch is the last. A larger number would divide losses by it.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad
        if stage
        else 0.0,  # 1.0 by default; the engine clips at stage 0
        "zero_optimization": zero,
    }


def _key_problems(values: Mapping[str, Any], keys: Mapping[str, Key], prefix: str) -> list[str]:
    problems = []
    for name, value in values.items():
        if name not in keys:
            close = difflib.get_close_matches(name, keys, n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            problems.append(f"unknown key {prefix}{name}{hint}")
        elif keys[name].verdict == "refused" and not is_off(name, value):
            problems.append(f"{prefix}{name}: refused: {keys[name].reason}")
    return problems


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)} is there twice")
    return values


def _given(values: Mapping[str, Any], name: str) -> Any:
    value = values.get(name)
    return None if value == "auto" else value


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{key} {value!r}: must be a number, or auto")
    return float(value)
