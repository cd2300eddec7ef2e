"""DeepSpeed's engine behind the loop: its ZeRO stages, with our layers, our loss and AdamW."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine.base import PendingLosses, StepLosses
from megatron_lfr.engine.deepspeed_groups import Groups, make_secondary_group
from megatron_lfr.engine.deepspeed_package import import_deepspeed
from megatron_lfr.engine.deepspeed_partitions import MOMENTS, make_partitions, set_secondary_group
from megatron_lfr.engine.deepspeed_weights import Weight, describe_weights
from megatron_lfr.engine.forward_backward import MicroBatchLoop, model_inputs
from megatron_lfr.engine.losses import LaunchedStep, reduce_losses, sum_losses
from megatron_lfr.engine.optimizer import OptimizerConfig, build_optimizer
from megatron_lfr.model import Decoder
from megatron_lfr.model.lora import flops_per_token
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.collectives import all_reduce_sum, group_rank
from megatron_lfr.parallel.flat_shard import FlatShard
from megatron_lfr.parallel.layers import partial_gradients
from megatron_lfr.parallel.spans import MICRO_BATCHES, OPTIMIZER, span


class DeepSpeedEngine:
    """Trains a model in one stage on this rank's share of each global batch; sizes as for ForwardEngine.

    model: on the meta device. settings: what `deepspeed.initialize` is given. seed: that of the initial weights; None
    leaves them undefined, for a checkpoint to replace, as draws_base=False does with frozen ones. The host waits for
    each step's gradient norm, as DeepSpeed's does.
    """

    def __init__(
        self,
        model: Decoder,
        config: OptimizerConfig,
        parallel: ParallelState,
        settings: Mapping[str, Any],
        *,
        micro_batch_size: int,
        seed: int | None,
        draws_base: bool = True,
    ) -> None:
        deepspeed = import_deepspeed(parallel.device.type == "cpu")
        self.parallel, self._model, self._clip_grad = parallel, model, config.clip_grad
        self._stage = int(settings["zero_optimization"]["stage"])
        weights, groups = describe_weights(model), Groups(parallel)
        self._allocate(deepspeed, settings, groups)
        parameters = {weight: model.get_parameter(weight.name) for weight in weights}
        self._weights = {weight: parameter for weight, parameter in parameters.items() if parameter.requires_grad}
        self._frozen = {weight: parameter for weight, parameter in parameters.items() if not parameter.requires_grad}
        partial = partial_gradients(model, model.tp)
        for weight, parameter in self._weights.items():
            # Read by DeepSpeed's norm: parameters without it count on the first tensor-parallel rank alone.
            parameter.tensor_model_parallel = weight.shard_dim is not None  # type: ignore[attr-defined]
            if weight.name in partial:
                parameter.register_hook(lambda grad: all_reduce_sum(grad, parallel.tensor_group))  # type: ignore[no-untyped-call]
        decayed = [weight.is_matrix for weight in self._weights]
        optimizer = build_optimizer(config, list(self._weights.values()), decayed)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what memory it uses, for one of its optimizers
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=copy.deepcopy(dict(settings)),
                mpu=groups,
                dist_init_required=False,
            )
        self._partitions = make_partitions(self._engine.optimizer, self._stage)
        self._loop = MicroBatchLoop(self._engine, micro_batch_size, _Boundaries(self._engine, parallel))
        self.eval_rows = micro_batch_size * parallel.data_parallel_size
        if seed is not None:
            self._init_weights(seed, self.weights() | (self.base_weights() if draws_base else {}))

    def _allocate(self, deepspeed: Any, settings: Mapping[str, Any], groups: Groups) -> None:
        """Give the model memory. At stage 3, DeepSpeed shards each weight before the next one gets any."""
        device = self.parallel.device
        if settings.get("bf16", {}).get("enabled"):
            for parameter in self._model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        if self._stage < 3:
            self._model.empty_on(device)
            return
        size = settings["zero_optimization"].get("zero_hpz_partition_size", 1)
        secondary = make_secondary_group(self.parallel, size)
        set_secondary_group(secondary)

        def shard(module: nn.Module) -> None:
            if next(module.parameters(recurse=False), None) is not None:
                deepspeed.zero.Init(
                    module=module,
                    data_parallel_group=groups.get_data_parallel_group(),
                    config_dict_or_path=copy.deepcopy(dict(settings)),
                    mpu=groups,
                    zero_param_parallel_group=secondary,
                )

        self._model.empty_on(device, then=shard)

    def _init_weights(self, seed: int, weights: Mapping[str, Tensor]) -> None:
        """Draw the initial values of weights: each rank draws no more than what it holds, in fp32."""
        for name, view in weights.items():
            assert isinstance(view, FlatShard)
            for start, part in view.pieces.items():
                self._model.init_part(name.removeprefix("model."), part, start, seed)
        self.loaded()

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def flops_per_token(self, seq_length: int) -> float:
        return flops_per_token(self._model, seq_length)

    def eval_step(self, batch: Batch) -> PendingLosses:
        losses = self._loop.evaluate(model_inputs(batch, self.parallel.device, 1.0))
        return reduce_losses(batch, losses, self.parallel)

    def train_step(self, batch: Batch, lr: float) -> StepLosses:
        # DeepSpeed clips where it steps, so that the gradient must have its normaliser before.
        scale = 1.0 / self._valid_tokens(batch).clamp(min=1.0)
        device = self.parallel.device
        keys = self._model.draw_sample_keys(batch.step, batch.rows, device)
        with span(MICRO_BATCHES):
            losses = self._loop.train(model_inputs(batch, device, scale.float(), keys))
        blocks = reduce_losses(batch, losses, self.parallel)
        loss = _sum_over_ranks(sum_losses(losses, self.parallel.device).double(), self.parallel)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        with span(OPTIMIZER):
            norm = self._step_replicated() if self._stage == 0 else self._step_partitioned()
        skipped = not math.isfinite(norm)
        return LaunchedStep(blocks, torch.stack((loss, *loss.new_tensor((norm * norm, 1.0, float(skipped))))))

    def tensors(self) -> dict[str, Tensor]:
        tensors = self.weights()
        for weight, parameter in self._weights.items():
            tensors[f"optimizer.{weight.name}.step"] = self._partitions.step_count(parameter)
            for moment in MOMENTS:
                tensors[f"optimizer.{weight.name}.{moment}"] = self._view(weight, moment)
        return tensors

    def weights(self) -> dict[str, Tensor]:
        return {f"model.{weight.name}": self._view(weight) for weight in self._weights}

    def base_weights(self) -> dict[str, Tensor]:
        return {
            f"model.{w.name}": FlatShard(parameter.detach().view(-1), 0, w.local_shape, w.full_shape, w.origin)
            for w, parameter in self._frozen.items()
        }

    def loaded(self) -> None:
        self._partitions.loaded()

    def _view(self, weight: Weight, moment: str | None = None) -> Tensor:
        flat, start = self._partitions.part(self._weights[weight], moment)
        return FlatShard(flat, start, weight.local_shape, weight.full_shape, weight.origin)

    def _valid_tokens(self, batch: Batch) -> Tensor:
        """Return the number of tokens that count in the loss of the step, over all ranks: an fp64 scalar."""
        first = group_rank(self.parallel.context_group) == 0
        tokens = torch.full((), batch.valid_tokens if first else 0, dtype=torch.float64, device=self.parallel.device)
        return _sum_over_ranks(tokens, self.parallel)

    def _step_partitioned(self) -> float:
        """Let DeepSpeed clip and step; returns the gradient's norm before that, NaN where it has left the step out."""
        self._engine.step()
        if self._engine.was_step_applied():
            return float(self._engine.get_global_grad_norm())
        self._partitions.discard_gradients()
        return math.nan

    def _step_replicated(self) -> float:
        """Clip and step at ZeRO-0, where DeepSpeed neither clips nor checks; returns the gradient's norm before that. A
        step whose norm is not finite is left out."""
        grads = {w: parameter.grad for w, parameter in self._weights.items() if parameter.grad is not None}
        first = group_rank(self.parallel.tensor_group) == 0
        counted = [grad for weight, grad in grads.items() if first or weight.shard_dim is not None]
        squares = torch.stack(torch._foreach_norm(counted)).double().square().sum()
        dist.all_reduce(squares, group=self.parallel.tensor_group)
        norm = math.sqrt(float(squares))
        if not math.isfinite(norm):
            self._engine.optimizer.zero_grad()
            return norm
        if self._clip_grad:
            torch._foreach_mul_(list(grads.values()), min(1.0, self._clip_grad / (norm + 1e-6)))
        self._engine.step()
        return norm


@dataclass
class _Boundaries:
    """Backward passes through DeepSpeed, which sums gradients in the last of a step, or in each, as its stage wants.

    It divides sums by the data-parallel ranks: the loss is multiplied by them. A step whose loss is not finite ends
    with gradients that are not, so that every rank leaves it out.
    """

    engine: Any
    parallel: ParallelState
    _is_last: bool = False
    _losses: list[Tensor] = field(default_factory=list)

    def before_micro_batch(self, is_last: bool) -> None:
        self._is_last = is_last
        self.engine.set_gradient_accumulation_boundary(is_last)

    def backward(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        factor = loss.new_full((), self.parallel.data_parallel_size * self.parallel.config.context_parallel_size)
        if self._is_last:
            total = _sum_over_ranks(torch.stack(self._losses).sum(), self.parallel)
            factor = torch.where(total.isfinite(), factor, math.nan)
            self._losses = []
        # A new tensor: at stage 0, a hook on what the module returned divides by gradient_accumulation_steps.
        self.engine.backward(loss * factor, scale_wrt_gas=False)


def _sum_over_ranks(value: Tensor, parallel: ParallelState) -> Tensor:
    """Return the sum of a scalar over the ranks that report losses, on every rank."""
    total = value.clone() if parallel.reports_losses else torch.zeros_like(value)
    dist.all_reduce(total)
    return total
