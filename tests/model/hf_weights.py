"""Our weights under Hugging Face's names, and back: written down here once more, for the tests alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_lfr.model import Llama, ModelConfig
from megatron_lfr.parallel.layers import ShardedWeight

SIMPLE = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "mlp.gate_proj.weight",
    "feed_forward.up.weight": "mlp.up_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}


def to_hf(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by our names (weights or gradients) as tensors by Hugging Face's."""
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["final_norm.weight"]}
    if config.untie_embeddings_and_output_weights:
        theirs["lm_head.weight"] = ours["output.weight"]
    for key in list(theirs):
        if theirs[key].ndim == 2:
            theirs[key] = theirs[key][: config.vocab_size]
    heads = config.num_attention_heads // config.query_groups
    for i in range(config.num_layers):
        here, there = f"layers.{i}.", f"model.layers.{i}."
        for name, hf_name in SIMPLE.items():
            theirs[there + hf_name] = ours[here + name]
        qkv = ours[here + "attention.qkv.weight"]
        groups = qkv.reshape(config.query_groups, heads + 2, config.head_dim, config.hidden_size)
        theirs[there + "self_attn.q_proj.weight"] = groups[:, :heads].reshape(-1, config.hidden_size)
        theirs[there + "self_attn.k_proj.weight"] = groups[:, heads].reshape(-1, config.hidden_size)
        theirs[there + "self_attn.v_proj.weight"] = groups[:, heads + 1].reshape(-1, config.hidden_size)
    return theirs


@torch.no_grad()
def load_hf(model: Llama, theirs: dict[str, Tensor]) -> None:
    """Copy weights by Hugging Face's names into our model."""
    config = model.config
    full = {
        "embedding": theirs["model.embed_tokens.weight"],
        "final_norm": theirs["model.norm.weight"],
        "output": theirs["lm_head.weight"],
    }
    for i in range(config.num_layers):
        here, there = f"layers.{i}.", f"model.layers.{i}."
        for name, hf_name in SIMPLE.items():
            full[here + name.removesuffix(".weight")] = theirs[there + hf_name]
        rows: list[Tensor] = []
        q, k, v = (theirs[f"{there}self_attn.{x}_proj.weight"].split(config.head_dim) for x in "qkv")
        heads = config.num_attention_heads // config.query_groups
        for g in range(config.query_groups):
            rows += [*q[g * heads : (g + 1) * heads], k[g], v[g]]
        full[here + "attention.qkv"] = torch.cat(rows)
    for name, module in model.named_modules():
        if isinstance(module, ShardedWeight):
            module.load_full(full[name])
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            module.get_parameter("weight").copy_(full[name])


def hf_model(config: ModelConfig) -> LlamaForCausalLM:
    """transformers' Llama of the same shape, with random weights; norms too."""
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
