"""LoRA-RITE on adapters of which ranks hold parts: they are gathered, and every rank takes the same step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from megatron_lfr.engine.lora_rite import LoRARite, RiteConfig
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.engine.sharding import ShardedParameter
from megatron_lfr.parallel import ParallelState

Pair = tuple[ShardedParameter, ShardedParameter]
"""A factor [outputs, r] and a factor [r, inputs], which LoRA-RITE takes transposed."""


class ShardedLoRARite:
    """LoRA-RITE, whose state each rank of a pipeline stage holds all of: it is as small as the adapters are."""

    def __init__(
        self, config: OptimizerConfig, parameters: Sequence[ShardedParameter], parallel: ParallelState
    ) -> None:
        self._parallel = parallel
        self._groups = _group(parameters)
        shapes = [
            tuple(torch.empty(len(group), *_oriented(p.full_shape, p), device=parallel.device) for p in group[0])
            for group in self._groups
        ]
        self._rite = LoRARite([(a, b) for a, b in shapes], rite_config(config), self._sum_over_stages)

    def step(self, lr: float, skipped: Tensor) -> None:
        pairs = [self._gather(group, gradients=False) for group in self._groups]
        gradients = [self._gather(group, gradients=True) for group in self._groups]
        stepped = self._rite.step(pairs, gradients, lr, skipped)
        for group, factors in zip(self._groups, stepped, strict=True):
            for number, pair in enumerate(group):
                for parameter, factor in zip(pair, factors, strict=True):
                    self._write(parameter, factor[number])

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"optimizer.step": self._rite.step_count}
        for group, states in zip(self._groups, self._rite.states, strict=True):
            for number, pair in enumerate(group):
                for parameter, state in zip(pair, states, strict=True):
                    for field in fields(state):
                        tensors[f"optimizer.{parameter.name}.{field.name}"] = getattr(state, field.name)[number]
        return tensors

    def _gather(self, group: Sequence[Pair], gradients: bool) -> tuple[Tensor, Tensor]:
        """Return the factors of pairs, or their gradients, complete on every rank: [k, m, r] and [k, n, r]."""
        both = [
            torch.stack([_transposed(self._full(pair[side], gradients), pair[side]) for pair in group])
            for side in range(2)
        ]
        return both[0], both[1]

    def _full(self, parameter: ShardedParameter, gradient: bool) -> Tensor:
        part = parameter.local_grad() if gradient else parameter.local()
        if self._parallel.storage_mesh.size() == 1:
            return part
        spread = parameter.as_full(part, self._parallel)
        # One mesh dimension at a time: DTensor warns where both are gathered at once.
        return spread.redistribute(placements=[parameter.placements[0], Replicate()]).full_tensor()

    def _write(self, parameter: ShardedParameter, factor: Tensor) -> None:
        """Write this rank's part of a complete factor."""
        mesh, full = self._parallel.storage_mesh, _transposed(factor, parameter).contiguous()
        if mesh.size() > 1:
            complete = DTensor.from_local(full, mesh, [Replicate(), Replicate()], run_check=False)
            full = complete.redistribute(placements=parameter.placements).to_local()
        parameter.local().copy_(full)

    def _sum_over_stages(self, squares: Tensor) -> Tensor:
        dist.all_reduce(squares, group=self._parallel.pipeline_group)
        return squares


def rite_config(config: OptimizerConfig) -> RiteConfig:
    """Return what LoRA-RITE takes of the optimizer's settings."""
    return RiteConfig(
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        eps=config.rite_eps,
        relative_eps=config.rite_relative_eps,
        clip=config.rite_clip,
        escape=config.rite_escape,
        weight_decay=config.weight_decay,
    )


def _group(parameters: Sequence[ShardedParameter]) -> list[list[Pair]]:
    """Return the pairs by the shapes of their factors."""
    by_name = {parameter.name: parameter for parameter in parameters}
    groups: dict[tuple[torch.Size, torch.Size], list[Pair]] = {}
    for name, first in by_name.items():
        if name.endswith(".A.weight"):
            second = by_name[name.removesuffix(".A.weight") + ".B.weight"]
            groups.setdefault((first.full_shape, second.full_shape), []).append((second, first))
    return list(groups.values())


def _is_a(parameter: ShardedParameter) -> bool:
    return parameter.name.endswith(".A.weight")


def _transposed(tensor: Tensor, parameter: ShardedParameter) -> Tensor:
    """Turn a factor into LoRA-RITE's orientation [rows, r], or back."""
    return tensor.mT if _is_a(parameter) else tensor


def _oriented(shape: Sequence[int], parameter: ShardedParameter) -> tuple[int, ...]:
    return tuple(shape[::-1]) if _is_a(parameter) else tuple(shape)
