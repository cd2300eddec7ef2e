"""The native engine: our layers, FSDP2, PyTorch's pipeline schedules and AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatron_lfr.data.loader import Batch
from megatron_lfr.engine.base import BlockLosses, StepOutput
from megatron_lfr.engine.gradients import Gradients
from megatron_lfr.engine.losses import ReducedLosses, sum_losses
from megatron_lfr.engine.optimizer import OptimizerConfig, build_optimizer
from megatron_lfr.engine.passes import MicroBatchLoop, Passes, Pipeline, model_inputs
from megatron_lfr.engine.sharding import sharded_parameters
from megatron_lfr.model import Llama
from megatron_lfr.model.llama import Loss
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.collectives import group_rank


class NativeEngine:
    """Trains this rank's pipeline stages of a Llama, made by `build_stages`, on its share of each global batch.

    seq_length: tokens of a block. global_batch_size: blocks of a step over all ranks, a multiple of micro_batch_size
    times the data-parallel ranks.
    """

    def __init__(
        self,
        stages: Sequence[Llama],
        config: OptimizerConfig,
        parallel: ParallelState,
        *,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
    ) -> None:
        self.stages, self.parallel = list(stages), parallel
        self.clip_grad = config.clip_grad
        self.parameters = sharded_parameters(self.stages, parallel)
        # The optimizer sees this rank's parts as plain tensors: it needs to know nothing of meshes.
        self._parts = [nn.Parameter(p.local()) for p in self.parameters]
        decayed = [p.parameter.ndim >= 2 for p in self.parameters]
        self.optimizer = build_optimizer(config, self._parts, decayed)
        self.gradients = Gradients(self.stages, self.parameters, parallel)
        per_rank = global_batch_size // parallel.data_parallel_size
        self._passes: Passes
        if self.stages[0].stage.count == 1:
            self._passes = MicroBatchLoop(self.stages[0], micro_batch_size, parallel)
            self.eval_rows = micro_batch_size * parallel.data_parallel_size
        else:
            self._passes = Pipeline(self.stages, micro_batch_size, per_rank // micro_batch_size, seq_length, parallel)
            self.eval_rows = global_batch_size
        self._create_optimizer_state()

    @property
    def vocab_size(self) -> int:
        return self.stages[0].vocab_size

    def flops_per_token(self, seq_length: int) -> float:
        return self.stages[0].config.flops_per_token(seq_length)

    def train_step(self, batch: Batch, lr: float, stop: bool = False) -> StepOutput:
        # Which tokens are masked is known where they were read: the gradient is normalised by the tokens of all blocks
        # first, and by the valid ones when it is clipped.
        expected = max(1, int((batch.block_ids >= 0).sum()) * batch.labels.shape[1])
        losses = self._passes.train(model_inputs(batch, self.parallel.device, 1.0 / expected))
        blocks = ReducedLosses(batch, losses, self.parallel)
        self.gradients.finish()
        loss, valid, squares, stops = self._sum_over_ranks(batch, losses, stop)
        correction = expected / max(1.0, valid)
        loss, grad_norm = loss * correction, math.sqrt(squares) * correction
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not skipped:
            clip = self.clip_grad / (grad_norm + 1e-6) if self.clip_grad else 1.0  # as torch.nn.utils.clip_grad_norm_
            self.gradients.scale(correction * min(1.0, clip))
            self._update(lr)
        for parameter in self.parameters:
            parameter.parameter.grad = None
        return StepOutput(loss, blocks, grad_norm, skipped, stops > 0)

    def eval_step(self, batch: Batch) -> BlockLosses:
        losses = self._passes.evaluate(model_inputs(batch, self.parallel.device, 1.0))
        return ReducedLosses(batch, losses, self.parallel).wait()

    def tensors(self) -> dict[str, Tensor]:
        tensors = self.weights()
        for parameter, part in zip(self.parameters, self._parts, strict=True):
            for key, value in self.optimizer.state[part].items():
                whole = value if value.ndim == 0 else parameter.whole(value, self.parallel)
                tensors[f"optimizer.{parameter.name}.{key}"] = whole
        return tensors

    def weights(self) -> dict[str, Tensor]:
        for module in (module for stage in self.stages for module in stage.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves weights gathered, which would outlive what is written here
        return {f"model.{p.name}": p.whole(p.local(), self.parallel) for p in self.parameters}

    def _sum_over_ranks(self, batch: Batch, losses: list[Loss], stop: bool) -> list[float]:
        """(loss, valid tokens, squared gradient norm, ranks that ask to stop) of the whole step, before normalising."""
        parallel = self.parallel
        values = torch.zeros(4, dtype=torch.float64, device=parallel.device)
        if parallel.reports_losses:
            values[0] = sum_losses(losses, parallel.device)
            values[1] = batch.valid_tokens if group_rank(parallel.context_group) == 0 else 0
        values[2] = self.gradients.local_square_sum()
        values[3] = stop
        dist.all_reduce(values)
        summed: list[float] = values.tolist()
        return summed

    def _update(self, lr: float) -> None:
        for parameter, part in zip(self.parameters, self._parts, strict=True):
            part.data, part.grad = parameter.local(), parameter.local_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _create_optimizer_state(self) -> None:
        """Let AdamW make its moments now, so that a checkpoint can be loaded into them: a step with zero gradients
        at learning rate 0 changes nothing but the step counts, which are set back."""
        self._update(lr=0.0)
        for parameter in self.parameters:
            parameter.parameter.grad = None
        for state in self.optimizer.state.values():
            state["step"].zero_()
