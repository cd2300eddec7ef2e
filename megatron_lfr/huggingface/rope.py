"""Rotary positions in a config.json, in the spellings of transformers 4 (rope_theta, rope_scaling) and 5
(rope_parameters)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_lfr.huggingface.json_values import flag, integer, number
from megatron_lfr.model.config import ModelConfig

_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_KEYS: dict[str, tuple[str, ...]] = {
    "default": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ),
}
"""Kinds of scaling, and the parameters that each may have."""


def rope_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json about positions, in both spellings."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    kind, original = config.rope_scaling_type, config.rope_original_max_position_embeddings
    if config.use_rope_scaling:
        scaling = {"rope_type": kind, "factor": config.rope_scaling_factor}
        if kind in ("llama3", "yarn"):
            scaling["original_max_position_embeddings"] = original
        if kind == "llama3":
            scaling |= {
                "low_freq_factor": config.rope_low_freq_factor,
                "high_freq_factor": config.rope_high_freq_factor,
            }
        if kind == "yarn":
            scaling |= {
                "beta_fast": config.yarn_beta_fast,
                "beta_slow": config.yarn_beta_slow,
                "truncate": config.yarn_truncate,
            }
            if config.yarn_attention_factor is not None:
                scaling["attention_factor"] = config.yarn_attention_factor
    is_dynamic = config.use_rope_scaling and kind == "dynamic"
    return {
        # Dynamic scaling counts from here on, as it knows no original length.
        "max_position_embeddings": original if is_dynamic else config.max_position_embeddings,
        "rope_theta": config.rotary_base,
        **({"rope_scaling": scaling} if config.use_rope_scaling else {}),
        "rope_parameters": {**scaling, "rope_theta": config.rotary_base},
    }


def read_rope(settings: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Read the fields of ModelConfig about rotary positions. longest: max_position_embeddings."""
    given = {key: settings[key] for key in ("rope_scaling", "rope_parameters") if settings.get(key)}
    for key, rope in given.items():
        if not isinstance(rope, dict):
            raise ValueError(f"{key} is {rope!r}; expected an object")
    scalings = [_read_scaling(rope, longest) for rope in given.values()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ValueError(f"{' and '.join(f'{key} {rope}' for key, rope in given.items())} disagree")
    sources = [*given.values(), settings]
    thetas = [number(part, "rope_theta") for part in sources if part.get("rope_theta") is not None]
    for theta in thetas[1:]:
        if theta != thetas[0]:
            raise ValueError(f"rope_theta is given twice, as {thetas[0]} and as {theta}")
    return {"rotary_base": thetas[0] if thetas else 10000.0, **(scalings[0] if scalings else {})}


def _read_scaling(rope: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Read how the positions are stretched, from rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None] or ["default"]
    if kinds[0] != kinds[-1]:
        raise ValueError(f"rope_type is given twice, as {kinds[0]!r} and, under type, as {kinds[1]!r}")
    kind = kinds[0]
    if kind not in _KEYS:
        raise ValueError(f"rope_type {kind!r} is not supported; only {', '.join(_KEYS)} are")
    if unknown := [key for key in rope if key not in (*_ALWAYS, *_KEYS[kind])]:
        raise ValueError(f"rope parameter {unknown[0]!r} is not supported with rope_type {kind!r}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported; only 1 is")
    if kind == "default":
        return {}
    fields: dict[str, Any] = {"use_rope_scaling": True, "rope_scaling_type": kind}
    if kind == "yarn":
        return fields | _read_yarn(rope, longest)
    fields["rope_scaling_factor"] = number(rope, "factor")
    if kind == "dynamic":
        fields["rope_original_max_position_embeddings"] = longest
    if kind == "llama3":
        fields |= {
            "rope_low_freq_factor": number(rope, "low_freq_factor"),
            "rope_high_freq_factor": number(rope, "high_freq_factor"),
            "rope_original_max_position_embeddings": integer(rope, "original_max_position_embeddings"),
        }
    return fields


def _read_yarn(rope: Mapping[str, Any], longest: int) -> dict[str, Any]:
    original = integer(rope, "original_max_position_embeddings", longest)
    factor = number(rope, "factor", longest / original)
    attention = None if rope.get("attention_factor") is None else number(rope, "attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = [_mscale(factor, number(rope, key)) for key in ("mscale", "mscale_all_dim")]
        attention = scales[0] / scales[1]
    return {
        "rope_scaling_factor": factor,
        "rope_original_max_position_embeddings": original,
        "yarn_beta_fast": number(rope, "beta_fast", 32.0),
        "yarn_beta_slow": number(rope, "beta_slow", 1.0),
        "yarn_truncate": flag(rope, "truncate", True),
        "yarn_attention_factor": attention,
    }


def _mscale(factor: float, scale: float) -> float:
    """Compute DeepSeek's factor on scores, of which YaRN's is the one with scale 1."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
