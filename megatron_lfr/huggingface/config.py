"""Conversion of a model's sizes and parts to the config.json of a Hugging Face folder, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from megatron_lfr.huggingface.config_keys import CAP, check_keys
from megatron_lfr.huggingface.families import FAMILIES, Family, find_family
from megatron_lfr.huggingface.json_values import flag, integer, number
from megatron_lfr.huggingface.rope import read_rope, rope_settings
from megatron_lfr.model.config import ModelConfig


def to_hf_config(
    config: ModelConfig,
    dtype: str,
    eos_token_id: int | None,
    bos_token_id: int | None = None,
    model_type: str | None = None,
) -> dict[str, Any]:
    """Return the content of config.json, for the first family that can be this model, or for `model_type`.

    Raises ValueError that names the flags of what the families lack, or of what transformers refuses.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise ValueError(f"--model-type {model_type}: choose from {', '.join(FAMILIES)}")
    families = list(FAMILIES.values()) if model_type is None else [FAMILIES[model_type]]
    lacking: dict[str, list[str]] = {}
    for family in families:
        settings = _write(config, family)
        lacking[family.model_type] = _lacking(config, settings, family)
        if not lacking[family.model_type]:
            return {**settings, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "torch_dtype": dtype}
    nearest = min(families, key=lambda family: len(lacking[family.model_type]))
    what = f"transformers' {nearest.architecture} cannot be a model with {', '.join(lacking[nearest.model_type])}"
    raise ValueError(f"{what}{'' if model_type else ', and no other family comes nearer'}")


def from_hf_config(settings: Mapping[str, Any], allowed: Collection[str] = ()) -> tuple[ModelConfig, list[str]]:
    """Read the sizes and parts of a config.json, with transformers' defaults for what it leaves out, and notes on what
    is ignored. `allowed`: keys that are accepted although they are unknown.

    Raises ValueError that names what is missing, is not of the right type, or is a feature that our model lacks.
    """
    family = find_family(settings)
    notes = check_keys(settings, family, allowed)
    if (parallel := integer(settings, "pretraining_tp", 1)) != 1:
        notes.append(f"pretraining_tp {parallel}: left out, as it changes the order of sums alone")
    cap = 0.0 if settings.get(CAP) is None else number(settings, CAP)
    if cap:
        notes.append(f"{CAP} {cap}: the run caps its logits so, which transformers' {family.architecture} leaves out")
    given = {**family.defaults, **settings}
    sizes = _read_sizes(given, family)
    fields: dict[str, Any] = {
        **family.parts,
        **sizes,
        "norm_epsilon": number(given, family.numbers["norm_epsilon"], 1e-6),
        "init_method_std": number(given, family.numbers["init_method_std"], 0.02),
        "untie_embeddings_and_output_weights": not flag(given, "tie_word_embeddings"),
        "final_logit_softcapping": cap,
        "sliding_window": _read_window(given, family, sizes["num_layers"]),
    }
    for key, names in family.switches.items():
        fields |= dict.fromkeys(names, flag(given, key))
    if fields["position_embedding_type"] == "rope":
        fields |= read_rope(given, sizes["max_position_embeddings"])
    config = ModelConfig(**fields).canonical()
    config.validate()
    return config, notes


def _read_sizes(given: Mapping[str, Any], family: Family) -> dict[str, int]:
    keys, heads = family.sizes, integer(given, family.sizes["num_attention_heads"])
    hidden = integer(given, keys["hidden_size"])
    if given.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"head_dim is missing, and {keys['hidden_size']} {hidden} is not a multiple of "
            f"{keys['num_attention_heads']} {heads}"
        )
    defaults = {"num_query_groups": heads, "kv_channels": hidden // heads}
    if not family.parts["swiglu"]:
        defaults["ffn_hidden_size"] = 4 * hidden
    return {field: integer(given, key, defaults.get(field)) for field, key in keys.items()}


def _read_window(given: Mapping[str, Any], family: Family, layers: int) -> int | None:
    """Read the sliding window, which all layers must have."""
    if family.window is None or given.get("sliding_window") is None:
        return None
    if family.window == "switch" and not flag(given, "use_sliding_window"):
        return None
    types = given.get("layer_types")
    if types is None and family.window == "switch":
        first = given.get("max_window_layers", 28)
        types = ["full_attention"] if first == layers else ["sliding_attention"] if first == 0 else None
    elif types is None:
        types = ["sliding_attention"]
    if (
        not isinstance(types, list)
        or types[1:] != types[:-1]
        or types[:1] not in (["sliding_attention"], ["full_attention"])
    ):
        raise ValueError("layer_types or max_window_layers: a window in some layers alone is not supported")
    return None if types[0] == "full_attention" else integer(given, "sliding_window")


def _write(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the keys of config.json that make a model of the family as much like `config` as they can."""
    canonical = config.canonical()
    settings: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    settings |= {key: getattr(canonical, name) for name, key in (*family.sizes.items(), *family.numbers.items())}
    settings |= {key: values[0] for key, values in family.legal.items()}
    biases = {
        "add_qkv_bias": config.has_qkv_bias,
        "add_attention_output_bias": config.has_attention_output_bias,
        "add_mlp_bias": config.has_mlp_bias,
    }
    settings |= {key: all(biases[name] for name in names) for key, names in family.switches.items()}
    settings["tie_word_embeddings"] = not config.untie_embeddings_and_output_weights
    if family.parts["position_embedding_type"] == "rope":
        settings |= rope_settings(config)
    if family.window is not None:
        settings["sliding_window"] = config.sliding_window
    if family.window == "switch":
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        settings |= {
            "use_sliding_window": config.sliding_window is not None,
            "max_window_layers": config.num_layers if config.sliding_window is None else 0,
            "layer_types": [kind] * config.num_layers,
        }
    return settings


def _lacking(config: ModelConfig, settings: Mapping[str, Any], family: Family) -> list[str]:
    """Return the flags of what a config.json does not say of a model, found by reading it again."""
    if reason := family.refused(config):
        return [reason]
    try:
        read, _ = from_hf_config(settings)
    except ValueError as error:
        return [str(error)]
    before, after = (dataclasses.asdict(one) for one in (config.canonical(), read))
    may_differ = {"make_vocab_size_divisible_by", *(["max_position_embeddings"] if config.has_rope else [])}
    return [_as_flag(name, value) for name, value in before.items() if name not in may_differ and value != after[name]]


def _as_flag(name: str, value: Any) -> str:
    flag_name = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{flag_name}" if isinstance(value, bool) else f"--{flag_name} {value}"
