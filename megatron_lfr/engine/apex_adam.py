"""Gives apex's FusedAdam the interface of AdamW that the engine needs."""

from __future__ import annotations

from typing import Any

import torch
from apex.optimizers import FusedAdam
from torch import Tensor


class ApexAdamW(FusedAdam):  # type: ignore[misc]
    """FusedAdam with `found_inf`, as in PyTorch's fused AdamW: a scalar on the device, 1 where a step changes nothing.

    FusedAdam counts steps once for each group; this class keeps a count for each parameter, as PyTorch's AdamW does, so
    that the checkpoints of both are the same.
    """

    found_inf: Tensor

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        # Only its capturable form decides on the device, and takes the learning rate and the count as tensors there.
        super().__init__(groups, adam_w_mode=True, set_grad_none=True, capturable=True, **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            counts = [self.state[p]["step"] for p in group["params"] if "step" in self.state[p]]
            group["step"] = (counts[0] if counts else torch.zeros_like(self.found_inf)).reshape(1).int()
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.full_like(self.found_inf, group["lr"])
        # FusedAdam counts a step by the overflow that it found before; only after that, it asks the scaler.
        self._dummy_overflow_buf.copy_(self.found_inf)
        super().step(closure, grad_scaler=_GivenOverflow(self.found_inf))
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["step"] = group["step"][0].float()


class _GivenOverflow:
    """Answers what FusedAdam asks a gradient scaler."""

    def __init__(self, found_inf: Tensor) -> None:
        self._found_inf = found_inf

    def _check_inf_per_device(self, optimizer: ApexAdamW) -> dict[torch.device, Tensor]:
        return {self._found_inf.device: self._found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self._found_inf)
