"""apex's FusedAdam behind the interface that the engine needs of AdamW."""

from __future__ import annotations

from typing import Any

import torch
from apex.optimizers import FusedAdam


class ApexAdamW(FusedAdam):  # type: ignore[misc]
    """FusedAdam counts steps once a group; this keeps the count of every parameter's state, as PyTorch's AdamW does,
    so that checkpoints of the two are the same."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, adam_w_mode=True, set_grad_none=True, **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            counts = [self.state[p]["step"] for p in group["params"] if "step" in self.state[p]]
            group["step"] = int(counts[0]) if counts else 0
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["step"] = torch.tensor(float(group["step"]))
