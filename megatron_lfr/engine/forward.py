"""A model that computes losses: what evaluation needs of an engine, and training builds on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine.base import PendingLosses
from megatron_lfr.engine.losses import ReducedLosses
from megatron_lfr.engine.passes import MicroBatchLoop, Passes, Pipeline, model_inputs
from megatron_lfr.engine.sharding import sharded_parameters
from megatron_lfr.model import Llama
from megatron_lfr.parallel import ParallelState


class ForwardEngine:
    """Runs this rank's pipeline stages of a Llama, made by `build_stages`, forward on its share of each global batch.

    seq_length: tokens of a block. global_batch_size: blocks of a step over all ranks, a multiple of micro_batch_size
    times the data-parallel ranks.
    """

    def __init__(
        self,
        stages: Sequence[Llama],
        parallel: ParallelState,
        *,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
    ) -> None:
        self.stages, self.parallel = list(stages), parallel
        self.parameters = sharded_parameters(self.stages, parallel)
        per_rank = global_batch_size // parallel.data_parallel_size
        self._passes: Passes
        if self.stages[0].stage.count == 1:
            self._passes = MicroBatchLoop(self.stages[0], micro_batch_size, parallel)
            self.eval_rows = micro_batch_size * parallel.data_parallel_size
        else:
            self._passes = Pipeline(self.stages, micro_batch_size, per_rank // micro_batch_size, seq_length, parallel)
            self.eval_rows = global_batch_size

    @property
    def vocab_size(self) -> int:
        return self.stages[0].vocab_size

    def eval_step(self, batch: Batch) -> PendingLosses:
        losses = self._passes.evaluate(model_inputs(batch, self.parallel.device, 1.0))
        return ReducedLosses(batch, losses, self.parallel)

    def weights(self) -> dict[str, Tensor]:
        for module in (module for stage in self.stages for module in stage.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves weights gathered, which would outlive what is written here
        return {f"model.{p.name}": p.whole(p.local(), self.parallel) for p in self.parameters}
