"""Process groups, and layers whose weights are spread over them."""

from megatron_lfr.parallel.config import ParallelConfig
from megatron_lfr.parallel.groups import ParallelState, initialize, session, shutdown
from megatron_lfr.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
)

__all__ = [
    "ColumnParallelLinear",
    "ParallelConfig",
    "ParallelState",
    "RowParallelLinear",
    "TensorParallel",
    "VocabParallelEmbedding",
    "initialize",
    "session",
    "shutdown",
]
