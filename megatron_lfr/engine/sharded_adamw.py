"""AdamW on this rank's parts of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_lfr.engine.optimizer import OptimizerConfig, build_optimizer
from megatron_lfr.engine.sharding import ShardedParameter
from megatron_lfr.parallel import ParallelState


class ShardedAdamW:
    """AdamW, which gets the parts as plain tensors: it need not know about meshes."""

    def __init__(
        self, config: OptimizerConfig, parameters: Sequence[ShardedParameter], parallel: ParallelState
    ) -> None:
        self._parameters, self._parallel = parameters, parallel
        self.parts = [nn.Parameter(p.local()) for p in parameters]
        self._adamw = build_optimizer(config, self.parts, [p.parameter.ndim >= 2 for p in parameters])
        self.state = self._adamw.state
        self._create_state()

    def step(self, lr: float, skipped: Tensor) -> None:
        for parameter, part in zip(self._parameters, self.parts, strict=True):
            part.data, part.grad = parameter.local(), parameter.local_grad()
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.found_inf = skipped.float()  # type: ignore[attr-defined]  # read by fused AdamW
        self._adamw.step()
        self._adamw.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for parameter, part in zip(self._parameters, self.parts, strict=True):
            for key, value in self.state[part].items():
                full = value if value.ndim == 0 else parameter.as_full(value, self._parallel)
                tensors[f"optimizer.{parameter.name}.{key}"] = full
        return tensors

    def _create_state(self) -> None:
        """Make AdamW create its moments, by a step that is skipped, so that a checkpoint can be loaded into them."""
        self.step(lr=0.0, skipped=torch.ones((), device=self._parallel.device))
        for parameter in self._parameters:
            parameter.parameter.grad = None
