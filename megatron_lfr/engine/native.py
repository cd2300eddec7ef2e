"""The native engine is made of our layers, FSDP2, PyTorch's pipeline schedules and AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine.base import StepLosses
from megatron_lfr.engine.forward import ForwardEngine
from megatron_lfr.engine.forward_backward import model_inputs
from megatron_lfr.engine.gradients import Gradients
from megatron_lfr.engine.losses import LaunchedStep, reduce_losses, sum_losses
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.engine.sharded_adamw import ShardedAdamW
from megatron_lfr.engine.sharded_lora_rite import ShardedLoRARite
from megatron_lfr.engine.sharded_optimizer import ShardedOptimizer
from megatron_lfr.model import Decoder
from megatron_lfr.model.decoder import Loss
from megatron_lfr.model.lora import flops_per_token
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.collectives import group_rank
from megatron_lfr.parallel.spans import MICRO_BATCHES, OPTIMIZER, REDUCTION, span


class NativeEngine(ForwardEngine):
    """Trains this rank's pipeline stages of a model on its share of each global batch; sizes as for ForwardEngine."""

    def __init__(
        self,
        stages: Sequence[Decoder],
        config: OptimizerConfig,
        parallel: ParallelState,
        *,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
    ) -> None:
        super().__init__(
            stages,
            parallel,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
        )
        self.clip_grad = config.clip_grad
        self.gradients = Gradients(self.stages, self.parameters, parallel)
        make_optimizer = ShardedLoRARite if config.optimizer == "lora-rite" else ShardedAdamW
        self.optimizer: ShardedOptimizer = make_optimizer(config, self.parameters, parallel)

    def flops_per_token(self, seq_length: int) -> float:
        return flops_per_token(self.stages[0], seq_length)

    def train_step(self, batch: Batch, lr: float) -> StepLosses:
        # Each rank knows only which of its tokens are masked: the gradient is normalised by the tokens of all blocks
        # first, and by the valid ones when it is clipped.
        expected = max(1, int((batch.block_ids >= 0).sum()) * batch.labels.shape[1])
        device = self.parallel.device
        keys = self.stages[0].draw_sample_keys(batch.step, batch.rows, device)
        with span(MICRO_BATCHES):
            losses = self._forward_backward.train(model_inputs(batch, device, 1.0 / expected, keys))
        blocks = reduce_losses(batch, losses, self.parallel)
        with span(REDUCTION):
            self.gradients.finish()
        with span(OPTIMIZER):
            return LaunchedStep(blocks, self._step(self._sum_over_ranks(batch, losses), expected, lr))

    def _step(self, sums: Tensor, expected: int, lr: float) -> Tensor:
        """Clip the gradient, and take the optimizer's step. sums: (loss, valid tokens, squared gradient norm) over all
        ranks, which were divided by the `expected` tokens. Returns the figures of a LaunchedStep."""
        loss, valid, squares = sums.unbind()
        # All of this stays on the device. The numerators are tensors: of a number, PyTorch would take the reciprocal.
        correction = loss.new_full((), expected) / valid.clamp(min=1.0)
        loss, grad_norm = loss * correction, squares.sqrt() * correction
        skipped = 1.0 - (loss.isfinite() & grad_norm.isfinite()).double()
        factor = correction
        if self.clip_grad:  # as torch.nn.utils.clip_grad_norm_
            clip = loss.new_full((), self.clip_grad) / (grad_norm + 1e-6)
            factor = correction * clip.clamp(max=1.0)
        self.gradients.scale(factor)
        self.optimizer.step(lr, skipped)
        for parameter in self.parameters:
            parameter.parameter.grad = None
        return torch.stack((loss, squares, correction, skipped))

    def tensors(self) -> dict[str, Tensor]:
        return self.weights() | self.optimizer.tensors()

    def loaded(self) -> None:
        """Do nothing: the model computes with the tensors that `tensors` returns."""

    def _sum_over_ranks(self, batch: Batch, losses: list[Loss]) -> Tensor:
        """Return (loss, valid tokens, squared gradient norm) of the step over all ranks, not normalised: fp64 [3]."""
        parallel = self.parallel
        # Filled, not assigned: to copy an assigned number to a GPU, the host would wait for all that was launched.
        values = torch.zeros(3, dtype=torch.float64, device=parallel.device)
        if parallel.reports_losses:
            values[0] = sum_losses(losses, parallel.device)
            values[1].fill_(batch.valid_tokens if group_rank(parallel.context_group) == 0 else 0)
        values[2] = self.gradients.local_square_sum()
        dist.all_reduce(values)
        return values
