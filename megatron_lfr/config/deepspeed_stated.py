"""What a DeepSpeed configuration says of the run's own settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lfr.config.deepspeed_keys import is_off

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
"""--data-parallel-sharding-strategy by stage of ZeRO."""
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Stated:
    """A setting of the run (section, field) that the file gives a value, and the key that does."""

    key: str
    section: str
    field: str
    value: Any


def stated_settings(values: Mapping[str, Any]) -> list[Stated]:
    """Return the settings that the file gives a value; "auto" gives none. ValueError for a value of the wrong kind."""
    stated = []
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"zero_optimization.stage {stage!r}: must be 0, 1, 2 or 3")
    stated.append(
        Stated("zero_optimization.stage", "parallel", "data_parallel_sharding_strategy", STRATEGIES[int(stage)])
    )
    for name in BATCH:
        size = given(values, name)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name} {size!r}: must be a number of at least 1, or auto")
    for name, field in (("train_batch_size", "global_batch_size"), (BATCH[1], "micro_batch_size")):
        if (size := given(values, name)) is not None:
            stated.append(Stated(name, "training", field, size))
    if (clip := given(values, "gradient_clipping")) is not None:
        stated.append(Stated("gradient_clipping", "optimizer", "clip_grad", _read_number("gradient_clipping", clip)))
    return [*stated, *_stated_precision(values), *_stated_optimizer(values)]


def _stated_precision(values: Mapping[str, Any]) -> list[Stated]:
    stated = []
    for name in ("bf16", "bfloat16"):
        section = values.get(name, {})
        if not isinstance(section, dict):
            raise ValueError(f"{name}: expected an object of keys and values")
        if others := [key for key, value in section.items() if key != "enabled" and not is_off(key, value)]:
            raise ValueError(
                f"{name}.{others[0]}: refused: the weights that are updated, sums of gradients and the optimizer's "
                "state are fp32, and steps whose gradient is not finite are skipped"
            )
        enabled = given(section, "enabled")
        if enabled is not None:
            if not isinstance(enabled, bool):
                raise ValueError(f"{name}.enabled {enabled!r}: must be true, false or auto")
            stated.append(Stated(f"{name}.enabled", "training", "bf16", enabled))
    return stated


def _stated_optimizer(values: Mapping[str, Any]) -> list[Stated]:
    section = values.get("optimizer")
    if section is None:
        return []
    if not isinstance(section, dict) or not isinstance(section.get("params", {}), dict):
        raise ValueError("optimizer: expected an object with type and params")
    if str(section.get("type", "")).lower() not in ("adam", "adamw"):
        raise ValueError(f"optimizer.type {section.get('type')!r}: must be Adam or AdamW, both of which are AdamW")
    stated = []
    for name, value in section.get("params", {}).items():
        key = f"optimizer.params.{name}"
        if value == "auto" or (name in ("torch_adam", "adam_w_mode", "bias_correction", "fused") and value is True):
            continue
        if name == "betas":
            if not isinstance(value, list) or len(value) != 2:
                raise ValueError(f"{key} {value!r}: must be two numbers")
            stated += [
                Stated(key, "optimizer", f"adam_beta{number}", _read_number(key, beta))
                for number, beta in enumerate(value, 1)
            ]
        elif name in ("lr", "eps", "weight_decay"):
            field = "adam_eps" if name == "eps" else name
            stated.append(Stated(key, "optimizer", field, _read_number(key, value)))
        elif not is_off(name, value) or name in ("torch_adam", "adam_w_mode", "bias_correction"):
            raise ValueError(f"{key} {value!r}: refused: AdamW has lr, betas, eps and weight_decay")
    return stated


def given(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a key; None where it is missing or "auto"."""
    value = values.get(name)
    return None if value == "auto" else value


def _read_number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{key} {value!r}: must be a number, or auto")
    return float(value)
