"""Process groups, and layers whose weights are spread over them."""

from megatron_lfr.parallel.groups import ParallelState, initialize, shutdown
from megatron_lfr.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

__all__ = [
    "ColumnParallelLinear",
    "ParallelState",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "initialize",
    "shutdown",
]
