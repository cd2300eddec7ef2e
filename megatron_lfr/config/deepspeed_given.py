"""The configuration that DeepSpeed is given in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_lfr.config.deepspeed_keys import KEYS, OFFLOAD_KEYS, ZERO_ALIASES, ZERO_KEYS, Key
from megatron_lfr.config.deepspeed_stated import STRATEGIES, given

if TYPE_CHECKING:
    from megatron_lfr.config.run import RunConfig


def fill(values: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return what DeepSpeed is given for a run whose settings fit the file's `values`."""
    stage = STRATEGIES.index(config.parallel.sharding)
    return {
        "steps_per_print": None,  # its own lines would be between the run's
        **(_precision(values) if config.training.bf16 and stage else {}),
        **_passed(values, KEYS),
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        # Of no effect, as the engine says which micro-batch is the last. A larger number would divide losses by it.
        "gradient_accumulation_steps": 1,
        # 1.0 by default; the engine itself clips at stage 0.
        "gradient_clipping": config.optimizer.clip_grad if stage else 0.0,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW is as fast, and needs no compiler
        "zero_optimization": _zero(values, config, stage),
    }


def _precision(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections that make DeepSpeed keep bf16 weights beside its fp32 ones. At stage 0, where it would sum
    gradients in bf16, it is given fp32 weights, which the layers cast."""
    return {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": given(values.get("data_types") or {}, "grad_accum_dtype") or "fp32"},
        "communication_data_type": "fp32",
    }


def _zero(values: Mapping[str, Any], config: RunConfig, stage: int) -> dict[str, Any]:
    hidden = config.model.hidden_size
    automatic = {  # as Hugging Face's Trainer fills them
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    section = {ZERO_ALIASES.get(name, name): value for name, value in values.get("zero_optimization", {}).items()}
    automatic = {name: size for name, size in automatic.items() if section.get(name) == "auto"}
    zero = {"stage": stage, **_passed(section, ZERO_KEYS), **automatic}
    for name in ("offload_optimizer", "offload_param"):
        if (offload := zero.pop(name, None)) and given(offload, "device") == "cpu":
            zero[name] = _passed(offload, OFFLOAD_KEYS)
    if config.deepspeed.cpu_optimizer:
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    if zero.get("zero_hpz_partition_size") in (None, 0, 1):
        zero.pop("zero_hpz_partition_size", None)
    return zero


def _passed(values: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """Return what is handed on as it is; sizes may be written as 5e8, and DeepSpeed wants whole numbers."""
    passed = {}
    for name, value in values.items():
        if keys[name].verdict == "passed" and value != "auto":
            passed[name] = int(value) if keys[name].kind == "number" and value is not None else value
    return passed
