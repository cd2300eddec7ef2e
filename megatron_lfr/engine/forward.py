"""The forward engine computes losses: evaluation needs no more of an engine, and training builds on it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine.base import PendingLosses
from megatron_lfr.engine.forward_backward import ForwardBackward, MicroBatchLoop, Pipeline, model_inputs
from megatron_lfr.engine.losses import reduce_losses
from megatron_lfr.engine.sharding import ShardedParameter, ShardedSynchronization, reshard, sharded_parameters
from megatron_lfr.model import Decoder
from megatron_lfr.parallel import ParallelState


class ForwardEngine:
    """Runs this rank's stages of a model, sharded by `shard_stages`, forward on its share of each global batch.

    seq_length: tokens of a block. global_batch_size: blocks of a step over all ranks, a multiple of micro_batch_size
    times the data-parallel ranks.
    """

    def __init__(
        self,
        stages: Sequence[Decoder],
        parallel: ParallelState,
        *,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
    ) -> None:
        self.stages, self.parallel = list(stages), parallel
        parameters = sharded_parameters(self.stages, parallel)
        self.parameters = [p for p in parameters if p.parameter.requires_grad]
        self._frozen = [p for p in parameters if not p.parameter.requires_grad]
        self._forward_backward: ForwardBackward
        if self.stages[0].stage.count == 1:
            synchronization = ShardedSynchronization(self.stages[0], parallel.config.sharding)
            self._forward_backward = MicroBatchLoop(self.stages[0], micro_batch_size, synchronization)
            self.eval_rows = micro_batch_size * parallel.data_parallel_size
        else:
            self._forward_backward = Pipeline(self.stages, micro_batch_size, seq_length, parallel)
            self.eval_rows = global_batch_size

    @property
    def vocab_size(self) -> int:
        return self.stages[0].vocab_size

    def eval_step(self, batch: Batch) -> PendingLosses:
        losses = self._forward_backward.evaluate(model_inputs(batch, self.parallel.device, 1.0))
        return reduce_losses(batch, losses, self.parallel)

    def weights(self) -> dict[str, Tensor]:
        return self._by_name(self.parameters)

    def base_weights(self) -> dict[str, Tensor]:
        return self._by_name(self._frozen)

    def _by_name(self, parameters: Sequence[ShardedParameter]) -> dict[str, Tensor]:
        reshard(self.stages)
        return {f"model.{p.name}": p.as_full(p.local(), self.parallel) for p in parameters}
