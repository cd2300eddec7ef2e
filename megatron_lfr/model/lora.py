"""Which modules of a model are adapted by LoRA, by the names that they have in Hugging Face's models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.decoder import Decoder
from megatron_lfr.parallel.layers import ShardedWeight
from megatron_lfr.parallel.lora import LoRA, LoRAFactor

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
_ROW_PARALLEL = ("attention.output", "feed_forward.down")
"""The linear layers whose inputs are spread over tensor-parallel ranks; those of the others are their outputs."""
_QKV = ("q", "k", "v")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters that are trained instead of the model's weights."""

    lora_rank: int | None = None
    """Train low-rank adapters (LoRA) of this rank instead of the model's weights, which are those of --load, given with
    --finetune, and stay as they are. By default, the weights themselves are trained."""
    lora_alpha: float = 16.0
    """With --lora-rank: what an adapter computes is multiplied by this number and divided by the rank."""
    lora_target: str = "all"
    """With --lora-rank: the modules that get an adapter, as a list with commas of q, k, v (queries, keys and values), o
    (the layer after attention), gate, up, down (the feed-forward), or all. GPT-2's q, k and v are one module, and go
    together; without SwiGLU there is no gate."""
    lora_dropout: float = 0.0
    """With --lora-rank: the only value is 0, as a block's recorded loss is that of the complete model."""
    lora_load: str | None = None
    """With --lora-rank: the run folder, of a run with --lora-rank or of convert from-peft, whose newest adapters the
    run starts from, without their optimizer's state. They must have the base of --load, and this rank, alpha and
    target. By default, the product of a new adapter's factors is zero."""

    def targets(self, model: ModelConfig) -> tuple[str, ...]:
        """Return the names of the adapted modules of a layer; ValueError for one that the model does not have."""
        legal = legal_targets(model)
        names = legal if self.lora_target == "all" else [name.strip() for name in self.lora_target.split(",")]
        flag = f"--lora-target {self.lora_target}"
        if unknown := [name for name in names if name not in legal]:
            raise ValueError(f"{flag}: {unknown[0]!r} is no module of this model; choose from all, {', '.join(legal)}")
        if not model.has_rope and 0 < len(set(names) & set(_QKV)) < len(_QKV):
            raise ValueError(f"{flag}: q, k and v are one module of this model: name all of them, or none")
        return tuple(name for name in legal if name in names)

    def adapts(self, model: ModelConfig, *modules: str) -> bool:
        """Return whether one of the modules has weights that are trained: its own, or those of an adapter."""
        return self.lora_rank is None or not set(modules).isdisjoint(self.targets(model))

    def flops_per_token(self, model: ModelConfig, seq_length: int, *, causal: bool = True) -> float:
        """Return the floating-point operations of training on one token, as ModelConfig's: frozen weights have no
        gradient, which saves 2 of their 6, and each weight of an adapter adds 6."""
        adapters = 0 if self.lora_rank is None else adapter_parameters(model, self)
        return _flops_per_token(model, adapters, seq_length, causal)

    def validate(self, model: ModelConfig) -> None:
        """Check the settings; ValueError names the flag and the legal values."""
        if self.lora_rank is None:
            return
        if self.lora_dropout:
            raise ValueError(f"--lora-dropout {self.lora_dropout:g}: must be 0")
        if not self.lora_alpha > 0:
            raise ValueError(f"--lora-alpha {self.lora_alpha:g}: must be positive")
        self.targets(model)
        smallest = min(
            min(layer.inputs, layer.outputs[name]) for _, layer, names in adapted_layers(model, self) for name in names
        )
        if not 1 <= self.lora_rank <= smallest:
            raise ValueError(
                f"--lora-rank {self.lora_rank}: must lie between 1 and {smallest}, the fewest inputs or outputs of an "
                "adapted module"
            )


def legal_targets(model: ModelConfig) -> list[str]:
    """Return the modules of a model that can get an adapter: those of TARGETS that it has."""
    return [name for name in TARGETS if model.swiglu or name != "gate"]


class LinearLayer(NamedTuple):
    """A linear layer, and the modules of Hugging Face's models that it consists of."""

    inputs: int
    outputs: dict[str, int]
    """Number of outputs of each module, by name."""
    groups: int = 1
    """The outputs are this many groups, each of which has an equal share of every module's."""


def linear_layers(config: ModelConfig) -> dict[str, LinearLayer]:
    """Return the linear layers of a transformer layer, by their names in it."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_attention_heads * config.head_dim, config.query_groups * config.head_dim
    if config.has_rope:
        qkv = LinearLayer(hidden, {"q": queries, "k": keys, "v": keys}, config.query_groups)
    else:
        qkv = LinearLayer(hidden, {"qkv": queries + 2 * keys})
    layers = {"attention.qkv": qkv, "attention.output": LinearLayer(queries, {"o": hidden})}
    if config.swiglu:
        layers["feed_forward.gate"] = LinearLayer(hidden, {"gate": ffn})
    layers["feed_forward.up"] = LinearLayer(hidden, {"up": ffn})
    layers["feed_forward.down"] = LinearLayer(ffn, {"down": hidden})
    return layers


def adapted_layers(config: ModelConfig, lora: LoRAConfig) -> Iterator[tuple[str, LinearLayer, list[str]]]:
    """Yield (name, layer, names of its adapted modules) of each linear layer that has such modules."""
    targets = lora.targets(config)
    for name, layer in linear_layers(config).items():
        if adapted := [module for module in layer.outputs if _target(module) in targets]:
            yield name, layer, adapted


def _target(module: str) -> str:
    """Return the target that adapts a module: the one of its name, and for q, k and v in one module any of them."""
    return "q" if module == "qkv" else module


def adapter_factors(config: ModelConfig, lora: LoRAConfig, tensor_ranks: int = 1) -> list[tuple[int, int]]:
    """Return the numbers of weights of the factors A and B of each adapted module of a layer, as a tensor-parallel rank
    holds them: one of the two is spread over the ranks."""
    rank, factors = lora.lora_rank or 0, []
    for name, layer, adapted in adapted_layers(config, lora):
        a_ranks, b_ranks = (tensor_ranks, 1) if name in _ROW_PARALLEL else (1, tensor_ranks)
        factors += [(rank * layer.inputs // a_ranks, rank * layer.outputs[module] // b_ranks) for module in adapted]
    return factors


def adapter_parameters(config: ModelConfig, lora: LoRAConfig) -> int:
    """Return the number of weights of all adapters."""
    return config.num_layers * sum(map(sum, adapter_factors(config, lora)))


def flops_per_token(model: Decoder, seq_length: int) -> float:
    """Return LoRAConfig's for one stage of a model, by the adapters that it has."""
    factors = sum(math.prod(module.full_shape) for module in model.modules() if isinstance(module, LoRAFactor))
    return _flops_per_token(model.config, factors * model.config.num_layers / len(model.layers), seq_length, True)


def _flops_per_token(config: ModelConfig, adapters: float, seq_length: int, causal: bool) -> float:
    complete = config.flops_per_token(seq_length, causal=causal)
    return complete - 2 * config.product_parameters + 6 * adapters if adapters else complete


def add_adapters(model: Decoder, lora: LoRAConfig, frozen_dtype: torch.dtype) -> None:
    """Give a model, which has no memory yet, its adapters; all other weights are frozen, and held in `frozen_dtype`."""
    assert lora.lora_rank is not None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            frozen = nn.Parameter(parameter.detach().to(frozen_dtype), requires_grad=False)
            module.register_parameter(name, frozen)
    for name, sizes, adapted in adapted_layers(model.config, lora):
        for layer in model.layers.values():
            linear = layer.get_submodule(name)
            assert isinstance(linear, ShardedWeight)
            scale = lora.lora_alpha / lora.lora_rank
            linear.lora = LoRA(linear, sizes.outputs, adapted, sizes.groups, lora.lora_rank, scale)


def init_adapters(model: Decoder, seed: int) -> None:
    """Draw this rank's part of the initial adapters, which depend on `seed` only."""
    for name, module in model.named_modules():
        if isinstance(module, LoRAFactor):
            module.init_normal(f"{name}.weight", seed, 0.0)
