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
from torch.distributed import ProcessGroup

from megatron_lfr.engine.deepspeed_package import VERSION

MOMENTS = ("exp_avg", "exp_avg_sq")


class Partitions(Protocol):
    """This rank's parts of the weights and of AdamW's state."""

    def part(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int]:
        """Return (1-D view of this rank's elements of the fp32 weight or of one of its moments, the index of the first
        in the row-major weight); an empty view where there are none."""
        ...

    def step_count(self, parameter: nn.Parameter) -> Tensor:
        """Return the number of AdamW's steps: an fp32 scalar, which several parameters may share."""
        ...

    def loaded(self) -> None:
        """Copy the fp32 weights, into which something was written, to where the model computes. Collective."""
        ...

    def discard_gradients(self) -> None:
        """Forget the gradients of a step that was left out, as far as DeepSpeed does not."""
        ...


def make_partitions(optimizer: Any, stage: int) -> Partitions:
    """Make the view of what `engine.optimizer` of a ZeRO stage holds. ValueError names what DeepSpeed lacks."""
    if stage == 0:
        return Replicated(optimizer)
    if stage == 3:
        return ShardedParameters(optimizer)
    return Bf16Groups(optimizer) if hasattr(optimizer, Bf16Groups.FLATS) else FlatGroups(optimizer)


def set_secondary_group(group: ProcessGroup | None) -> None:
    """Let ZeRO-3 keep a second copy of the weights on the ranks of a group, or on none; it remembers the group of an
    earlier engine."""
    from deepspeed.utils import groups

    _require(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP")
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group


class Replicated:
    """ZeRO-0, where every rank holds everything, in AdamW itself."""

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

    def discard_gradients(self) -> None:
        pass


class FlatGroups:
    """ZeRO-1 and 2, where the weights of each parameter group are one flat buffer, of which each rank holds a range."""

    FLATS, WEIGHTS = "single_partition_of_fp32_groups", "bit16_groups"
    """Names of this rank's ranges and of the groups' weights."""
    SUMS: tuple[str, ...] = ("averaged_gradients",)
    """Name of the groups' sums of gradients, where a step that is left out may leave some."""

    def __init__(self, optimizer: Any) -> None:
        names = (
            self.FLATS,
            self.WEIGHTS,
            *self.SUMS,
            "_lazy_init_hp_params_optimizer_state",
            "update_lp_params",
            "optimizer",
        )
        _require(optimizer, *names)
        self._optimizer, self._state = optimizer, optimizer.optimizer.state
        flats, groups = getattr(optimizer, self.FLATS), getattr(optimizer, self.WEIGHTS)
        _create_state(self._state, flats)
        optimizer._lazy_init_hp_params_optimizer_state()  # it would do so after a step, of the first group alone
        self._flat = {parameter: flat for group, flat in zip(groups, flats, strict=True) for parameter in group}

    def part(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int]:
        _require(parameter, "_hp_mapping")
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return self._flat[parameter].detach()[:0], 0
        _require(mapping, "get_hp_fragment", "lp_fragment_address")
        return mapping.get_hp_fragment(moment).detach(), mapping.lp_fragment_address.start

    def step_count(self, parameter: nn.Parameter) -> Tensor:
        count: Tensor = self._state[self._flat[parameter]]["step"]
        return count

    def loaded(self) -> None:
        self._optimizer.update_lp_params()

    def discard_gradients(self) -> None:
        # With bf16 and the optimizer offloaded, DeepSpeed adds to the sums of the step that was left out for them, so
        # that no later step would ever be finite.
        for name in self.SUMS:
            sums = getattr(self._optimizer, name)
            for group in sums:
                sums[group] = None


class Bf16Groups(FlatGroups):
    """ZeRO-1 with weights in bf16, for which DeepSpeed has an optimizer apart, with other names."""

    FLATS, WEIGHTS, SUMS = "fp32_groups_flat_partition", "bf16_groups", ()


class ShardedParameters:
    """ZeRO-3, where each weight is cut into equal ranges, the last ones padded."""

    def __init__(self, optimizer: Any) -> None:
        _require(
            optimizer,
            "fp32_partitioned_groups_flat",
            "_get_fp32_opt_state_partition",
            "_get_param_partition_rank",
            "_reassign_or_swap_out_partitioned_parameters",
            "persistent_parameters",
            "invalidate_secondary_tensor",
            "optimizer",
        )
        self._optimizer = optimizer
        _create_state(optimizer.optimizer.state, optimizer.fp32_partitioned_groups_flat)

    def part(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int]:
        _require(parameter, "ds_numel")
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
        if small := optimizer.persistent_parameters:  # every rank holds them besides, and gathers those that it lacks
            small[0].partition(small)
            small[0].all_gather(small)
        optimizer.invalidate_secondary_tensor()

    def discard_gradients(self) -> None:
        pass

    def _partition(self, parameter: nn.Parameter, moment: str | None) -> tuple[Tensor, int]:
        """Return this rank's range with its padding, and the number of its group."""
        partition: tuple[Tensor, int] = self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=moment
        )
        return partition


def _require(of: Any, *names: str) -> None:
    """ValueError names what is missing of what the pinned version has."""
    for name in names:
        if not hasattr(of, name):
            kind = of.__name__ if hasattr(of, "__name__") else type(of).__name__
            raise ValueError(
                f"--deepspeed: DeepSpeed's {kind} has no {name}, which version {VERSION} has and checkpoints need; "
                "install it anew: pip install --force-reinstall 'megatron-lfr[deepspeed]'"
            )


def _create_state(state: Any, parts: Iterable[Tensor]) -> None:
    """Give AdamW the state that it would make in its first step."""
    for part in parts:
        zeros = {moment: torch.zeros_like(part).detach() for moment in MOMENTS}
        state[part] = {"step": torch.zeros((), dtype=torch.float32, device=part.device), **zeros}
