"""The weights of a model, as DeepSpeed's engine needs to know them when DeepSpeed has sharded and flattened them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lfr.model import Decoder
from megatron_lfr.parallel.layers import shard_dims


@dataclass(frozen=True)
class Weight:
    """The name of a parameter, and how this rank's slice of it fits into the full weight."""

    name: str
    shard_dim: int | None
    """The dimension that the tensor-parallel ranks share; None: each holds all of it."""
    local_shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    origin: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        return len(self.local_shape) > 1


def describe_weights(model: Decoder) -> list[Weight]:
    """Describe the parameters of a model that nothing has sharded yet over data-parallel ranks."""
    dims, weights = shard_dims(model), []
    for name, parameter in model.named_parameters():
        dim = dims[name]
        full, origin = list(parameter.shape), [0] * parameter.ndim
        if dim is not None:
            full[dim] *= model.tp.size
            origin[dim] = model.tp.rank * parameter.shape[dim]
        weights.append(Weight(name, dim, tuple(parameter.shape), tuple(full), tuple(origin)))
    return weights
