"""The names of our weights and those of Hugging Face's models. Rotary positions pair the same channels in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lfr.model.config import ModelConfig


@dataclass(frozen=True)
class Weight:
    """One of our weights, and the weights of Hugging Face's model that it consists of: one, or queries, keys and
    values."""

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of their weights, in the order of `theirs`."""
    has_qkv: bool = False
    """Whether its rows are queries, keys and values."""
    is_transposed: bool = False
    """Whether theirs is a matrix [inputs, outputs], as GPT-2's are."""

    @property
    def is_vocabulary(self) -> bool:
        """Whether our weight has rows of padding after theirs."""
        return self.ours in ("embedding.weight", "output.weight")

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the shape of our weight, with the padding."""
        if self.is_vocabulary:
            return (config.padded_vocab_size, config.hidden_size)
        if self.is_transposed:
            return self.shapes[0][::-1]
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def weights(config: ModelConfig) -> list[Weight]:
    """List all weights of a model, in the order of its forward pass."""
    return _llama_weights(config) if config.has_rope else _gpt2_weights(config)


def embedding_name(config: ModelConfig) -> str:
    """Return Hugging Face's name of the embedding; it takes no longer for any number of layers."""
    return "model.embed_tokens.weight" if config.has_rope else "transformer.wte.weight"


def _llama_weights(config: ModelConfig) -> list[Weight]:
    """List the weights of Llama and the families that have its names."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_attention_heads * config.head_dim, config.query_groups * config.head_dim
    normed = (queries, keys) if config.qk_layernorm_across_heads else (config.head_dim, config.head_dim)
    norms = ("input_layernorm", "post_attention_layernorm")
    if config.norm_after_sublayers:
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    listed = [_one("embedding.weight", embedding_name(config), _vocabulary(config), hidden)]
    for number in range(config.num_layers):
        ours, theirs = f"layers.{number}.", f"model.layers.{number}."
        attention, projections = f"{theirs}self_attn.", tuple(f"{theirs}self_attn.{x}_proj." for x in "qkv")
        listed.append(_one(f"{ours}attention_norm.weight", f"{theirs}{norms[0]}.weight", hidden))
        for kind, inputs in (("weight", (hidden,)), *([("bias", ())] if config.has_qkv_bias else [])):
            names = tuple(f"{projection}{kind}" for projection in projections)
            shapes = tuple((rows, *inputs) for rows in (queries, keys, keys))
            listed.append(Weight(f"{ours}attention.qkv.{kind}", names, shapes, has_qkv=True))
        if config.qk_layernorm:
            listed += [
                _one(f"{ours}attention.query_norm.weight", f"{attention}q_norm.weight", normed[0]),
                _one(f"{ours}attention.key_norm.weight", f"{attention}k_norm.weight", normed[1]),
            ]
        listed += _linear(
            f"{ours}attention.output", f"{attention}o_proj", hidden, queries, config.has_attention_output_bias
        )
        listed.append(_one(f"{ours}feed_forward_norm.weight", f"{theirs}{norms[1]}.weight", hidden))
        for name, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
            layer = f"{ours}feed_forward.{name}", f"{theirs}mlp.{name}_proj"
            listed += _linear(*layer, rows, columns, config.has_mlp_bias)
    listed.append(_one("final_norm.weight", "model.norm.weight", hidden))
    if config.untie_embeddings_and_output_weights:
        listed.append(_one("output.weight", "lm_head.weight", _vocabulary(config), hidden))
    return listed


def _gpt2_weights(config: ModelConfig) -> list[Weight]:
    """List the weights of GPT-2, whose linear layers are matrices [inputs, outputs]."""
    hidden, ffn, longest = config.hidden_size, config.ffn_size, config.max_position_embeddings
    listed = [
        _one("embedding.weight", embedding_name(config), _vocabulary(config), hidden),
        _one("position_embedding.weight", "transformer.wpe.weight", longest, hidden),
    ]
    for number in range(config.num_layers):
        for ours, theirs, inputs, outputs in (
            ("attention_norm", "ln_1", None, hidden),
            ("attention.qkv", "attn.c_attn", hidden, 3 * hidden),
            ("attention.output", "attn.c_proj", hidden, hidden),
            ("feed_forward_norm", "ln_2", None, hidden),
            ("feed_forward.up", "mlp.c_fc", hidden, ffn),
            ("feed_forward.down", "mlp.c_proj", ffn, hidden),
        ):
            names = f"layers.{number}.{ours}", f"transformer.h.{number}.{theirs}"
            listed += _conv1d(*names, inputs, outputs, has_qkv=ours == "attention.qkv")
    listed += _conv1d("final_norm", "transformer.ln_f", None, hidden)
    if config.untie_embeddings_and_output_weights:
        listed.append(_one("output.weight", "lm_head.weight", _vocabulary(config), hidden))
    return listed


def to_theirs(weight: Weight, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
    """Split our tensor into Hugging Face's, in the order of `weight.theirs`, and cut off the vocabulary's padding."""
    parts = [tensor[: weight.shapes[0][0]] if weight.is_vocabulary else tensor]
    if weight.has_qkv:
        heads, columns = config.num_attention_heads // config.query_groups, tensor.shape[1:]
        groups = tensor.reshape(config.query_groups, heads + 2, config.head_dim, *columns)
        split = groups[:, :heads], groups[:, heads], groups[:, heads + 1]
        parts = [part.reshape(-1, *columns) for part in split]
    if len(parts) > len(weight.theirs):
        parts = [torch.cat(parts)]
    return [part.t() for part in parts] if weight.is_transposed else parts


def to_ours(weight: Weight, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """Join Hugging Face's tensors, in the order of `weight.theirs`, into ours without the vocabulary's padding."""
    parts = [tensor.t() for tensor in tensors] if weight.is_transposed else list(tensors)
    if not weight.has_qkv:
        return parts[0]
    if len(parts) == 1:
        keys = config.query_groups * config.head_dim
        parts = list(torch.split(parts[0], [len(parts[0]) - 2 * keys, keys, keys]))
    shape = (config.query_groups, -1, config.head_dim, *parts[0].shape[1:])
    return torch.cat([part.reshape(shape) for part in parts], 1).flatten(0, 2)


def check_finite(where: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError where a weight holds NaN or infinity, with which nothing can be computed."""
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{where}: {name} holds numbers that are not finite")


def _vocabulary(config: ModelConfig) -> int:
    assert config.vocab_size is not None
    return config.vocab_size


def _one(ours: str, theirs: str, *shape: int) -> Weight:
    return Weight(ours, (theirs,), (shape,))


def _linear(ours: str, theirs: str, rows: int, columns: int, has_bias: bool) -> list[Weight]:
    bias = [_one(f"{ours}.bias", f"{theirs}.bias", rows)] if has_bias else []
    return [_one(f"{ours}.weight", f"{theirs}.weight", rows, columns), *bias]


def _conv1d(ours: str, theirs: str, inputs: int | None, outputs: int, has_qkv: bool = False) -> list[Weight]:
    """List the weight and bias of one of GPT-2's linear layers, or of a norm, which has no inputs."""
    shape = (outputs,) if inputs is None else (inputs, outputs)
    return [
        Weight(f"{ours}.weight", (f"{theirs}.weight",), (shape,), has_qkv, is_transposed=inputs is not None),
        Weight(f"{ours}.bias", (f"{theirs}.bias",), ((outputs,),), has_qkv),
    ]
