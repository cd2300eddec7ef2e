"""How a model and its data are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the process groups. Only one rank is supported so far."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library; auto: NCCL on a GPU, gloo on a CPU."""

    def validate(self, world_size: int) -> None:
        for flag, value in (
            ("--tensor-model-parallel-size", self.tensor_model_parallel_size),
            ("--pipeline-model-parallel-size", self.pipeline_model_parallel_size),
            ("--context-parallel-size", self.context_parallel_size),
        ):
            if value != 1:
                raise ValueError(f"{flag} {value}: only 1 is supported so far")
        if world_size != 1:
            raise ValueError(f"{world_size} ranks were started (WORLD_SIZE): only 1 is supported so far")

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that hold a whole model between them, each set with its own share of a step's blocks."""
        return world_size // (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )
