"""Whole models under Hugging Face's names, and transformers' Llama to compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_lfr.huggingface.names import to_ours, to_theirs, weights
from megatron_lfr.model import Decoder, ModelConfig


def to_hf(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by our names (weights or gradients) as tensors by Hugging Face's."""
    theirs: dict[str, Tensor] = {}
    for weight in weights(config):
        theirs.update(zip(weight.theirs, to_theirs(weight, ours[weight.ours], config), strict=True))
    return theirs


@torch.no_grad()
def load_hf(model: Decoder, theirs: dict[str, Tensor]) -> None:
    """Copy weights by Hugging Face's names into our model."""
    for weight in weights(model.config):
        full = to_ours(weight, [theirs[name] for name in weight.theirs], model.config)
        parameter = model.get_parameter(weight.ours)
        parameter[: len(full)] = full
        parameter[len(full) :] = 0.0  # the vocabulary's padding


def hf_model(config: ModelConfig) -> LlamaForCausalLM:
    """Make transformers' Llama of the same shape, with random weights; norms too."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.use_rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_max_position_embeddings,
        }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.query_groups,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.norm_epsilon,
            tie_word_embeddings=not config.untie_embeddings_and_output_weights,
            rope_parameters=rope,
            initializer_range=0.08,
            use_cache=False,
            attn_implementation="eager",
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model
