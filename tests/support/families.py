"""Tiny random models of every family, made by transformers as public checkpoints are configured."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases of attention": ("llama", {"attention_bias": True}),
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, linear": ("llama", _rope("linear", factor=2.0)),
    "llama, dynamic": ("llama", _rope("dynamic", factor=2.0)),
    "llama, yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama, llama3": (
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "mistral, head_dim apart": ("mistral", {"sliding_window": None, "head_dim": 12, "hidden_size": 36}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, a window, yarn's details": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 0,
            **_rope(
                "yarn",
                factor=2.0,
                original_max_position_embeddings=32,
                beta_fast=16.0,
                beta_slow=2.0,
                attention_factor=0.9,
                truncate=False,
            ),
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2, untied, wide": ("gpt2", {**_GPT2, "n_inner": 80, "tie_word_embeddings": False}),
}
"""Name → (model_type, what differs from small sizes)."""


def make_model(name: str) -> PreTrainedModel:
    """Make a model with random weights; those of norms and biases are no ones and zeros."""
    model_type, changes = MODELS[name]
    sizes = {} if model_type == "gpt2" else _SIZES
    config = AutoConfig.for_model(model_type, **{**sizes, **changes}, initializer_range=0.08, use_cache=False)
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.uniform_(parameter, -0.3, 0.3)
        elif parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()
