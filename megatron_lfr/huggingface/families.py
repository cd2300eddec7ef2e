"""The families of models that transformers and we both have: what all models of one are, and how its config.json says
what differs between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.presets import FAMILIES as PRESETS

_PARTS = (
    "swiglu",
    "normalization",
    "norm_after_sublayers",
    "qk_layernorm",
    "qk_layernorm_across_heads",
    "disable_bias_linear",
    "add_qkv_bias",
    "position_embedding_type",
)
_LLAMA_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
_LLAMA_NUMBERS = {"norm_epsilon": "rms_norm_eps", "init_method_std": "initializer_range"}
_ATTENTION_BIAS = {"attention_bias": ("add_qkv_bias", "add_attention_output_bias")}
_SILU: dict[str, tuple[object, ...]] = {"hidden_act": ("silu", "swish")}


@dataclass(frozen=True)
class Family:
    """A family of models."""

    model_type: str
    architecture: str
    """Name of transformers' class."""
    sizes: Mapping[str, str] = field(default_factory=lambda: _LLAMA_SIZES)
    """Fields of ModelConfig that are integers, and their keys in config.json."""
    numbers: Mapping[str, str] = field(default_factory=lambda: _LLAMA_NUMBERS)
    """Fields that are other numbers, and their keys."""
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Keys that are true or false, and the fields that are true with them."""
    legal: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: _SILU)
    """Keys of what these models can do and ours cannot, with their only legal values, of which the first is written."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for keys that are left out."""
    window: Literal["key", "switch"] | None = None
    """How a sliding window is given: by sliding_window, or by use_sliding_window too; None if there is none."""

    @property
    def parts(self) -> dict[str, Any]:
        """Fields of ModelConfig that all models of the family have."""
        return {name: getattr(PRESETS[self.model_type], name) for name in _PARTS}

    def read_keys(self) -> set[str]:
        """Return the keys that the conversion reads."""
        rope = (
            {"rope_theta", "rope_scaling", "rope_parameters"} if self.parts["position_embedding_type"] == "rope" else ()
        )
        window = {"key": {"sliding_window"}, "switch": {"sliding_window", "use_sliding_window", "max_window_layers"}}
        windows = (window[self.window] | {"layer_types"}) if self.window else ()
        return {*self.sizes.values(), *self.numbers.values(), *self.switches, *rope, *windows}

    def refused(self, config: ModelConfig) -> str | None:
        """Return why transformers refuses a model of this family that we can have; None if it does not."""
        if self.model_type == "llama" and config.hidden_size % config.num_attention_heads:
            return (
                f"--hidden-size {config.hidden_size} is not a multiple of --num-attention-heads "
                f"{config.num_attention_heads}"
            )
        return None


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            switches={**_ATTENTION_BIAS, "mlp_bias": ("add_mlp_bias",)},
            defaults={"max_position_embeddings": 2048},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            window="key",
        ),
        Family("qwen2", "Qwen2ForCausalLM", defaults={"max_position_embeddings": 32768}, window="switch"),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            switches=_ATTENTION_BIAS,
            defaults={"max_position_embeddings": 32768, "head_dim": 128},
            window="switch",
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            switches=_ATTENTION_BIAS,
            defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            sizes={
                "num_layers": "n_layer",
                "hidden_size": "n_embd",
                "num_attention_heads": "n_head",
                "ffn_hidden_size": "n_inner",
                "vocab_size": "vocab_size",
                "max_position_embeddings": "n_positions",
            },
            numbers={"norm_epsilon": "layer_norm_epsilon", "init_method_std": "initializer_range"},
            legal={
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "reorder_and_upcast_attn": (False,),
            },
            defaults={"layer_norm_epsilon": 1e-5, "n_positions": 1024, "tie_word_embeddings": True},
        ),
    )
}
"""By model_type. A run's model is written as the first that can be it."""


def find_family(settings: Mapping[str, Any]) -> Family:
    """Return the family that a config.json names; ValueError where it names none of ours, or two."""
    kind, architectures = settings.get("model_type"), settings.get("architectures")
    if kind is None and architectures is None:
        raise ValueError("neither model_type nor architectures is there: which model is it?")
    if kind is not None and (not isinstance(kind, str) or kind not in FAMILIES):
        raise ValueError(f"model_type {kind!r} is not supported; only {', '.join(FAMILIES)} are")
    candidates = [FAMILIES[kind]] if kind is not None else list(FAMILIES.values())
    for family in candidates:
        if architectures is None or architectures == [family.architecture]:
            return family
    legal = ", ".join(repr([family.architecture]) for family in candidates)
    raise ValueError(f"architectures {architectures!r} is not supported; only {legal} is")
