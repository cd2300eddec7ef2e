"""The names of our weights and those of Hugging Face's Llama. Rotary positions pair the same channels in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lfr.model.config import ModelConfig


@dataclass(frozen=True)
class Weight:
    """One of our weights, and the weights of Hugging Face's Llama that it consists of: one, or queries, keys and
    values."""

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of their weights, in the order of `theirs`."""

    @property
    def is_vocabulary(self) -> bool:
        """Whether our weight has rows of padding after theirs."""
        return self.ours in ("embedding.weight", "output.weight")

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the shape of our weight, with the padding."""
        if self.is_vocabulary:
            return (config.padded_vocab_size, config.hidden_size)
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def weights(config: ModelConfig) -> list[Weight]:
    """List all weights of a model, in the order of its forward pass."""
    hidden, ffn, vocabulary = config.hidden_size, config.ffn_size, config.vocab_size
    assert vocabulary is not None
    width, narrow = config.num_attention_heads * config.head_dim, config.query_groups * config.head_dim
    listed = [_one("embedding.weight", "model.embed_tokens.weight", vocabulary, hidden)]
    for number in range(config.num_layers):
        ours, theirs = f"layers.{number}.", f"model.layers.{number}."
        projections = tuple(f"{theirs}self_attn.{x}_proj.weight" for x in "qkv")
        listed += [
            _one(f"{ours}attention_norm.weight", f"{theirs}input_layernorm.weight", hidden),
            Weight(f"{ours}attention.qkv.weight", projections, ((width, hidden), (narrow, hidden), (narrow, hidden))),
            _one(f"{ours}attention.output.weight", f"{theirs}self_attn.o_proj.weight", hidden, width),
            _one(f"{ours}feed_forward_norm.weight", f"{theirs}post_attention_layernorm.weight", hidden),
            _one(f"{ours}feed_forward.gate.weight", f"{theirs}mlp.gate_proj.weight", ffn, hidden),
            _one(f"{ours}feed_forward.up.weight", f"{theirs}mlp.up_proj.weight", ffn, hidden),
            _one(f"{ours}feed_forward.down.weight", f"{theirs}mlp.down_proj.weight", hidden, ffn),
        ]
    listed.append(_one("final_norm.weight", "model.norm.weight", hidden))
    if config.untie_embeddings_and_output_weights:
        listed.append(_one("output.weight", "lm_head.weight", vocabulary, hidden))
    return listed


def to_theirs(weight: Weight, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
    """Split our tensor into Hugging Face's, in the order of `weight.theirs`, and cut off the vocabulary's padding."""
    if len(weight.theirs) == 1:
        return [tensor[: weight.shapes[0][0]]]
    heads, hidden = config.num_attention_heads // config.query_groups, config.hidden_size
    groups = tensor.reshape(config.query_groups, heads + 2, config.head_dim, hidden)
    parts = groups[:, :heads], groups[:, heads], groups[:, heads + 1]
    return [part.reshape(-1, hidden) for part in parts]


def to_ours(weight: Weight, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """Join Hugging Face's tensors, in the order of `weight.theirs`, into ours without the vocabulary's padding."""
    if len(weight.theirs) == 1:
        return tensors[0]
    shape = (config.query_groups, -1, config.head_dim, config.hidden_size)
    return torch.cat([tensor.reshape(shape) for tensor in tensors], 1).flatten(0, 2)


def check_finite(where: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError where a weight holds NaN or infinity, with which nothing can be computed."""
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{where}: {name} holds numbers that are not finite")


def _one(ours: str, theirs: str, *shape: int) -> Weight:
    return Weight(ours, (theirs,), (shape,))
