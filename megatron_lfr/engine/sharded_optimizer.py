"""The protocol of what updates the parts of weights that ranks hold."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ShardedOptimizer(Protocol):
    """Updates this rank's parts of the weights by their gradients."""

    def step(self, lr: float, skipped: Tensor) -> None:
        """Take a step at learning rate `lr`. If the scalar `skipped` is 1, it changes neither weights nor state."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that training continues from, by name; a checkpoint is loaded by writing into it."""
        ...
