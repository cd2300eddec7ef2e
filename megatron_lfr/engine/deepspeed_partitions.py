"""Where DeepSpeed keeps the fp32 weights and AdamW's state of this rank: all names of its that are private, for the one
version that setup.py names.

Each class below is for some stages of ZeRO: it makes AdamW's moments, so that a checkpoint can be loaded before the
first step, and gives views of what this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

VERSION = "0.19.8"
"""Of DeepSpeed, as in setup.py."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Partitions(Protocol):
    """This rank's parts of the weights and of AdamW's state."""

    def part(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int]:
        """(1-D view of this rank's elements of the fp32 weight or of one of its moments, the index of the first in the
        row-major weight); an empty view where there are none."""
        ...

    def step_count(self, parameter: nn.Parameter) -> Tensor:
        """The number of AdamW's steps: an fp32 scalar, which several parameters may share."""
        ...

    def loaded(self) -> None:
        """Copy the fp32 weights, into which something was written, to where the model computes. Collective."""
        ...


def make_partitions(optimizer: Any, stage: int) -> Partitions:
    """The parts behind `engine.optimizer` of a ZeRO stage."""
    if stage == 0:
        return Replicated(optimizer)
    return ShardedParameters(optimizer) if stage == 3 else FlatGroups(optimizer)


class Replicated:
    """ZeRO-0: every rank holds everything, in AdamW itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._state = optimizer.state
        _create_state(self._state, (p for group in optimizer.param_groups for p in group["params"]))

    def part(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int]:
        tensor = parameter if moment is None else self._state[parameter][moment]
        return tensor.detach().view(-1), 0

    def step_count(self, parameter: nn.Parameter) -> Tensor:
        count: Tensor = self._state[parameter]["step"]
        return count

    def loaded(self) -> None:
        pass


class FlatGroups:
    """ZeRO-1 and 2: the weights of each parameter group are one flat buffer, of which each rank holds a range."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        flats = optimizer.single_partition_of_fp32_groups
        self._state = optimizer.optimizer.state
        _create_state(self._state, flats)
        optimizer._lazy_init_hp_params_optimizer_state()  # it would do so after a step, of the first group alone
        self._flat = {
            parameter: flat for group, flat in zip(optimizer.bit16_groups, flats, strict=True) for parameter in group
        }

    def part(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int]:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return self._flat[parameter].detach()[:0], 0
        return mapping.get_hp_fragment(moment).detach(), mapping.lp_fragment_address.start

    def step_count(self, parameter: nn.Parameter) -> Tensor:
        count: Tensor = self._state[self._flat[parameter]]["step"]
        return count

    def loaded(self) -> None:
        self._optimizer.update_lp_params()


class ShardedParameters:
    """ZeRO-3: each weight is cut into equal ranges, the last ones padded."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        _create_state(optimizer.optimizer.state, optimizer.fp32_partitioned_groups_flat)

    def part(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int]:
        part, _ = self._partition(parameter, moment)
        start = part.numel() * self._optimizer._get_param_partition_rank(parameter)
        size: int = parameter.ds_numel  # type: ignore[attr-defined]
        return part.detach()[: max(0, size - start)], min(start, size)

    def step_count(self, parameter: nn.Parameter) -> Tensor:
        _, group = self._partition(parameter, None)
        count: Tensor = self._optimizer.optimizer.state[self._optimizer.fp32_partitioned_groups_flat[group]]["step"]
        return count

    def loaded(self) -> None:
        optimizer = self._optimizer
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # the small ones, which every rank holds besides
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    def _partition(self, parameter: nn.Parameter, moment: str | None) -> tuple[Tensor, int]:
        found: tuple[Tensor, int] = self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=moment
        )
        return found


def _create_state(state: Any, parts: Iterable[Tensor]) -> None:
    """Give AdamW the state that it would make in its first step."""
    for part in parts:
        zeros = {moment: torch.zeros_like(part).detach() for moment in MOMENTS}
        state[part] = {"step": torch.zeros((), dtype=torch.float32, device=part.device), **zeros}
