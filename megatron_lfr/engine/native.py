"""The native engine is made of our layers, FSDP2, PyTorch's pipeline schedules and AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine.base import StepLosses
from megatron_lfr.engine.forward import ForwardEngine
from megatron_lfr.engine.forward_backward import model_inputs
from megatron_lfr.engine.gradients import Gradients
from megatron_lfr.engine.losses import LaunchedStep, reduce_losses, sum_losses
from megatron_lfr.engine.optimizer import OptimizerConfig, build_optimizer
from megatron_lfr.model import Decoder
from megatron_lfr.model.decoder import Loss
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
        # The optimizer gets this rank's parts as plain tensors: it need not know about meshes.
        self._parts = [nn.Parameter(p.local()) for p in self.parameters]
        decayed = [p.parameter.ndim >= 2 for p in self.parameters]
        self.optimizer = build_optimizer(config, self._parts, decayed)
        self.gradients = Gradients(self.stages, self.parameters, parallel)
        self._create_optimizer_state()

    def flops_per_token(self, seq_length: int) -> float:
        return self.stages[0].config.flops_per_token(seq_length)

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
        self._update(lr, skipped)
        for parameter in self.parameters:
            parameter.parameter.grad = None
        return torch.stack((loss, squares, correction, skipped))

    def tensors(self) -> dict[str, Tensor]:
        tensors = self.weights()
        for parameter, part in zip(self.parameters, self._parts, strict=True):
            for key, value in self.optimizer.state[part].items():
                full = value if value.ndim == 0 else parameter.as_full(value, self.parallel)
                tensors[f"optimizer.{parameter.name}.{key}"] = full
        return tensors

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

    def _update(self, lr: float, skipped: Tensor) -> None:
        """Take AdamW's step. If `skipped` is 1, it changes neither weights nor moments nor step counts."""
        for parameter, part in zip(self.parameters, self._parts, strict=True):
            part.data, part.grad = parameter.local(), parameter.local_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]  # read by fused AdamW
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _create_optimizer_state(self) -> None:
        """Make AdamW create its moments, by a step that is skipped, so that a checkpoint can be loaded into them."""
        self._update(lr=0.0, skipped=torch.ones((), device=self.parallel.device))
        for parameter in self.parameters:
            parameter.parameter.grad = None
