"""Models by name, for --model-preset: families without sizes, and sizes."""

from __future__ import annotations

import dataclasses

from megatron_lfr.model.config import ModelConfig

FAMILIES: dict[str, ModelConfig] = {
    "llama": ModelConfig(),
    "mistral": ModelConfig(untie_embeddings_and_output_weights=True),
    "qwen2": ModelConfig(add_qkv_bias=True, norm_epsilon=1e-6),
    "qwen3": ModelConfig(qk_layernorm=True, norm_epsilon=1e-6),
    "olmo2": ModelConfig(
        qk_layernorm=True,
        qk_layernorm_across_heads=True,
        norm_after_sublayers=True,
        untie_embeddings_and_output_weights=True,
    ),
    "gpt2": ModelConfig(
        normalization="LayerNorm",
        swiglu=False,
        disable_bias_linear=False,
        position_embedding_type="learned_absolute",
        max_position_embeddings=1024,
    ),
}
"""The parts of each family's models, by its model_type in Hugging Face's config.json; sizes are left to be given."""


def _gpt2(layers: int, hidden: int, heads: int, length: int = 1024) -> ModelConfig:
    return dataclasses.replace(
        FAMILIES["gpt2"],
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        max_position_embeddings=length,
    )


MODEL_PRESETS: dict[str, ModelConfig] = {
    # Parameters with a vocabulary of 2048; the sizes below with 32000 (120M to 1.1B) and 128256 (8B, 70B).
    "demo": ModelConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=352,
        max_position_embeddings=1024,
    ),
    "120M": ModelConfig(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        ffn_hidden_size=2304,
        max_position_embeddings=4096,
    ),
    "300M": ModelConfig(
        num_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=4,
        ffn_hidden_size=2816,
        max_position_embeddings=4096,
    ),
    "500M": ModelConfig(
        num_layers=24,
        hidden_size=1280,
        num_attention_heads=20,
        num_query_groups=4,
        ffn_hidden_size=3840,
        max_position_embeddings=4096,
    ),
    # TinyLlama-1.1B
    "1.1B": ModelConfig(
        num_layers=22,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=4,
        ffn_hidden_size=5632,
        max_position_embeddings=2048,
        untie_embeddings_and_output_weights=True,
    ),
    # Llama 3
    "8B": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        rotary_base=500000.0,
        untie_embeddings_and_output_weights=True,
    ),
    "70B": ModelConfig(
        num_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=28672,
        rotary_base=500000.0,
        untie_embeddings_and_output_weights=True,
    ),
    # Radford et al. 2019, with a vocabulary of 50257
    "gpt2-124M": _gpt2(12, 768, 12),
    "gpt2-355M": _gpt2(24, 1024, 16),
    "gpt2-774M": _gpt2(36, 1280, 20),
    "gpt2-1.5B": _gpt2(48, 1600, 25),
    # Brown et al. 2020, without its alternating sparse attention, as Megatron's example trains it
    "gpt3-175B": _gpt2(96, 12288, 96, 2048),
    **FAMILIES,
}
"""The models that --model-preset knows, by name."""
