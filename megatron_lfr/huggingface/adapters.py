"""The adapters of our layers under the names of the `peft` package, and merged into the weights that they adapt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_lfr.huggingface.names import Weight, to_ours, to_theirs, weights
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.lora import LoRAConfig, adapted_layers


class WeightReader(Protocol):
    """Reads one tensor at a time, as StoredTensors does."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read the fp32 tensor `name`; ValueError where it is missing, or is not of this shape."""
        ...

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise the ValueError that `read` would raise, without reading the tensor."""
        ...


@dataclass(frozen=True)
class Adapter:
    """The pair of one module of a model: its name here and in Hugging Face's model."""

    ours: str
    theirs: str
    inputs: int
    outputs: int
    weight: Weight
    """The weight that it adapts, or a part of it."""

    def names(self) -> tuple[str, str]:
        """Return the names of A and B in a checkpoint."""
        return f"model.{self.ours}.A.weight", f"model.{self.ours}.B.weight"

    def peft_names(self) -> tuple[str, str]:
        """Return the names of A and B in `peft`'s file."""
        return tuple(f"base_model.model.{self.theirs}.lora_{factor}.weight" for factor in "AB")  # type: ignore[return-value]

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B, here and there."""
        return (rank, self.inputs), (self.outputs, rank)

    def b_to_theirs(self, b: Tensor, model: ModelConfig) -> Tensor:
        """Bring B's rows into the order of Hugging Face's outputs: where q, k and v are one module, ours is another."""
        return to_theirs(self._rows(), b, model)[0] if self._is_joint else b

    def b_to_ours(self, b: Tensor, model: ModelConfig) -> Tensor:
        """Bring B's rows into our order."""
        return to_ours(self._rows(), [b], model) if self._is_joint else b

    @property
    def _is_joint(self) -> bool:
        return self.weight.has_qkv and len(self.weight.theirs) == 1

    def _rows(self) -> Weight:
        return dataclasses.replace(self.weight, is_transposed=False)


def adapters(model: ModelConfig, lora: LoRAConfig) -> Iterator[Adapter]:
    """Yield the adapters of a model, in the order of its layers."""
    by_name = {weight.ours: weight for weight in weights(model)}
    for number in range(model.num_layers):
        for layer, sizes, adapted in adapted_layers(model, lora):
            name = f"layers.{number}.{layer}"
            weight = by_name[f"{name}.weight"]
            for module, theirs in zip(sizes.outputs, weight.theirs, strict=True):
                if module in adapted:
                    ours = f"{name}.lora.{module}"
                    yield Adapter(ours, theirs.removesuffix(".weight"), sizes.inputs, sizes.outputs[module], weight)


class MergedWeights:
    """The weights of a base with its adapters added: W + alpha / r · B A."""

    def __init__(self, base: WeightReader, adapted: WeightReader, model: ModelConfig, lora: LoRAConfig) -> None:
        assert lora.lora_rank is not None
        self._base, self._adapted, self._model = base, adapted, model
        self._rank, self._scale = lora.lora_rank, lora.lora_alpha / lora.lora_rank
        self._adapters: dict[str, list[Adapter]] = {}
        for adapter in adapters(model, lora):
            self._adapters.setdefault(f"model.{adapter.weight.ours}", []).append(adapter)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        weight = self._base.read(name, shape)
        return weight + self._delta(name) if name in self._adapters else weight

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        self._base.check(name, shape)
        for adapter in self._adapters.get(name, []):
            for factor, size in zip(adapter.names(), adapter.shapes(self._rank), strict=True):
                self._adapted.check(factor, size)

    def _delta(self, name: str) -> Tensor:
        pairs = self._adapters[name]
        weight = dataclasses.replace(pairs[0].weight, is_transposed=False)
        products = {adapter.theirs: self._product(adapter) for adapter in pairs}
        if not weight.has_qkv or len(weight.theirs) == 1:  # B's rows are in our order
            (product,) = products.values()
            return product
        parts = [
            products.get(theirs.removesuffix(".weight"), torch.zeros(shape))
            for theirs, shape in zip(weight.theirs, weight.shapes, strict=True)
        ]
        return to_ours(weight, parts, self._model)

    def _product(self, adapter: Adapter) -> Tensor:
        a, b = (
            self._adapted.read(name, size)
            for name, size in zip(adapter.names(), adapter.shapes(self._rank), strict=True)
        )
        return self._scale * b @ a
