"""Conversion of a model's sizes to the config.json of Hugging Face's Llama, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_lfr.huggingface.config_keys import ARCHITECTURE, CAP, check_keys
from megatron_lfr.model.config import ModelConfig

_ROPE_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; ValueError names the file and says what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__} instead of an object")
    return value


def to_hf_config(
    config: ModelConfig, dtype: str, eos_token_id: int | None, bos_token_id: int | None = None
) -> dict[str, Any]:
    """Return the content of config.json. Positions are written twice: transformers 5 reads `rope_parameters`, 4.x reads
    `rope_theta` and `rope_scaling`. Raises ValueError for what transformers' Llama refuses or lacks."""
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"--hidden-size {config.hidden_size} is not a multiple of --num-attention-heads "
            f"{config.num_attention_heads}: transformers refuses such a Llama, whatever --kv-channels is"
        )
    if config.final_logit_softcapping:
        raise ValueError(
            f"--final-logit-softcapping {config.final_logit_softcapping}: transformers' {ARCHITECTURE} does not cap "
            "logits; the folder would be another model"
        )
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.use_rope_scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_max_position_embeddings,
        }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.query_groups,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rotary_base,
        **({"rope_scaling": scaling} if config.use_rope_scaling else {}),
        "rope_parameters": {**scaling, "rope_theta": config.rotary_base},
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
    }


def from_hf_config(settings: Mapping[str, Any], allowed: Collection[str] = ()) -> tuple[ModelConfig, list[str]]:
    """Read the sizes of a config.json, with transformers' defaults for what it leaves out, and notes on what is
    ignored. `allowed`: keys that are accepted although they are unknown.

    Raises ValueError that names what is missing, is not of the right type, or is a feature that our model lacks.
    """
    notes = check_keys(settings, allowed)
    if (parallel := _integer(settings, "pretraining_tp", 1)) != 1:
        notes.append(f"pretraining_tp {parallel}: left out, as it changes the order of sums alone")
    cap = 0.0 if settings.get(CAP) is None else _number(settings, CAP)
    if cap:
        notes.append(f"{CAP} {cap}: the run caps its logits so, which transformers' {ARCHITECTURE} leaves out")
    if "model_type" not in settings and "architectures" not in settings:
        raise ValueError("neither model_type nor architectures is there: which model is it?")
    heads = _integer(settings, "num_attention_heads")
    hidden = _integer(settings, "hidden_size")
    if settings.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"head_dim is missing, and hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    config = ModelConfig(
        num_layers=_integer(settings, "num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=_integer(settings, "num_key_value_heads", heads),
        kv_channels=_integer(settings, "head_dim", hidden // heads),
        ffn_hidden_size=_integer(settings, "intermediate_size"),
        vocab_size=_integer(settings, "vocab_size"),
        max_position_embeddings=_integer(settings, "max_position_embeddings", 2048),
        norm_epsilon=_number(settings, "rms_norm_eps", 1e-6),
        final_logit_softcapping=cap,
        init_method_std=_number(settings, "initializer_range", 0.02),
        untie_embeddings_and_output_weights=not _flag(settings, "tie_word_embeddings"),
        **_read_rope(settings),
    )
    config.validate()
    return config, notes


def _read_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of ModelConfig about positions."""
    given = {key: settings[key] for key in ("rope_scaling", "rope_parameters") if settings.get(key)}
    for key, rope in given.items():
        if not isinstance(rope, dict):
            raise ValueError(f"{key} is {rope!r}; expected an object")
    scalings = [_read_scaling(rope) for rope in given.values()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ValueError(f"{' and '.join(f'{key} {rope}' for key, rope in given.items())} disagree")
    sources = [*given.values(), settings]
    thetas = [_number(part, "rope_theta") for part in sources if part.get("rope_theta") is not None]
    for theta in thetas[1:]:
        if theta != thetas[0]:
            raise ValueError(f"rope_theta is given twice, as {thetas[0]} and as {theta}")
    return {"rotary_base": thetas[0] if thetas else 10000.0, **(scalings[0] if scalings else {})}


def _read_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Read how the positions are stretched, from rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    if unknown := [key for key in rope if key not in _ROPE_KEYS]:
        raise ValueError(f"rope parameter {unknown[0]!r} is not supported")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported; only 1 is")
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None] or ["default"]
    if kinds[0] != kinds[-1]:
        raise ValueError(f"rope_type is given twice, as {kinds[0]!r} and, under type, as {kinds[1]!r}")
    if kinds[0] == "default":
        return {}
    if kinds[0] != "llama3":
        raise ValueError(f"rope_type {kinds[0]!r} is not supported; only default and llama3 are")
    return {
        "use_rope_scaling": True,
        "rope_scaling_factor": _number(rope, "factor"),
        "rope_low_freq_factor": _number(rope, "low_freq_factor"),
        "rope_high_freq_factor": _number(rope, "high_freq_factor"),
        "rope_original_max_position_embeddings": _integer(rope, "original_max_position_embeddings"),
    }


def _integer(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = settings.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{key} is {value!r}; expected a positive integer below 2^31")
    return value


def _number(settings: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = settings.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}; expected a positive, finite number")
    return float(value)


def _flag(settings: Mapping[str, Any], key: str) -> bool:
    value = settings.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return value
