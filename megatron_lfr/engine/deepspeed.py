"""DeepSpeed's engine behind the loop: its ZeRO stages, with our layers, our loss and AdamW."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine.base import PendingLosses, StepLosses
from megatron_lfr.engine.deepspeed_partitions import MOMENTS, VERSION, make_partitions
from megatron_lfr.engine.forward_backward import MicroBatchLoop, model_inputs
from megatron_lfr.engine.losses import LaunchedStep, reduce_losses, sum_losses
from megatron_lfr.engine.optimizer import OptimizerConfig, build_optimizer
from megatron_lfr.model import Llama
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.collectives import all_reduce_sum, group_rank
from megatron_lfr.parallel.flat_shard import FlatShard
from megatron_lfr.parallel.layers import ShardedWeight


def import_deepspeed(on_cpu: bool) -> ModuleType:
    """DeepSpeed, which is imported where it is used; ValueError where it is not installed."""
    os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed wants of one rank without a launcher, too
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a GPU that is there counts for more than gloo
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"--deepspeed: needs DeepSpeed ({error}): pip install 'megatron-lfr[deepspeed]'") from error
    if deepspeed.__version__.partition("+")[0] != VERSION:
        raise ValueError(
            f"--deepspeed: needs DeepSpeed {VERSION}, of which it reads the partitions, not {deepspeed.__version__}: "
            "pip install 'megatron-lfr[deepspeed]'"
        )
    # It would compile, for minutes, a kernel of inference on a CPU, which training does not call.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed  # type: ignore[no-any-return]


class DeepSpeedEngine:
    """Trains a Llama in one stage on this rank's share of each global batch; sizes as for ForwardEngine.

    model: with memory, its weights initialised or to be loaded. settings: what `deepspeed.initialize` is given. The
    host waits for each step's gradient norm, as DeepSpeed's does.
    """

    def __init__(
        self,
        model: Llama,
        config: OptimizerConfig,
        parallel: ParallelState,
        settings: Mapping[str, Any],
        *,
        micro_batch_size: int,
    ) -> None:
        deepspeed = import_deepspeed(parallel.device.type == "cpu")
        self.parallel, self._model, self._clip_grad = parallel, model, config.clip_grad
        self._stage = int(settings["zero_optimization"]["stage"])
        self._weights = _describe_weights(model)
        for weight in self._weights:
            # Read by DeepSpeed's norm: parameters without it count on the first tensor-parallel rank alone.
            weight.parameter.tensor_model_parallel = weight.shard_dim is not None  # type: ignore[attr-defined]
            if weight.shard_dim is None and model.tp.sequence:  # each rank has seen some of the tokens only
                weight.parameter.register_hook(lambda grad: all_reduce_sum(grad, parallel.tensor_group))  # type: ignore[no-untyped-call]
        parameters = [weight.parameter for weight in self._weights]
        optimizer = build_optimizer(config, parameters, [p.ndim >= 2 for p in parameters])
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=copy.deepcopy(dict(settings)),
            mpu=_Groups(parallel),
            dist_init_required=False,
        )
        self._partitions = make_partitions(self._engine.optimizer, self._stage)
        self._loop = MicroBatchLoop(self._engine, micro_batch_size, _Boundaries(self._engine, parallel))
        self.eval_rows = micro_batch_size * parallel.data_parallel_size

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def flops_per_token(self, seq_length: int) -> float:
        return self._model.config.flops_per_token(seq_length)

    def eval_step(self, batch: Batch) -> PendingLosses:
        losses = self._loop.evaluate(model_inputs(batch, self.parallel.device, 1.0))
        return reduce_losses(batch, losses, self.parallel)

    def train_step(self, batch: Batch, lr: float) -> StepLosses:
        # DeepSpeed clips where it steps, so that the gradient must have its normaliser before.
        scale = 1.0 / self._valid_tokens(batch).clamp(min=1.0)
        losses = self._loop.train(model_inputs(batch, self.parallel.device, scale.float()))
        blocks = reduce_losses(batch, losses, self.parallel)
        loss = _sum_over_ranks(sum_losses(losses, self.parallel.device).double(), self.parallel)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._step_replicated() if self._stage == 0 else self._step_partitioned()
        skipped = not math.isfinite(norm)
        return LaunchedStep(blocks, torch.stack((loss, *loss.new_tensor((norm * norm, 1.0, float(skipped))))))

    def tensors(self) -> dict[str, Tensor]:
        tensors = self.weights()
        for weight in self._weights:
            tensors[f"optimizer.{weight.name}.step"] = self._partitions.step_count(weight.parameter)
            for moment in MOMENTS:
                tensors[f"optimizer.{weight.name}.{moment}"] = self._view(weight, moment)
        return tensors

    def weights(self) -> dict[str, Tensor]:
        return {f"model.{weight.name}": self._view(weight) for weight in self._weights}

    def loaded(self) -> None:
        self._partitions.loaded()

    def _view(self, weight: _Weight, moment: str | None = None) -> Tensor:
        flat, start = self._partitions.part(weight.parameter, moment)
        return FlatShard(flat, start, weight.local_shape, weight.full_shape, weight.origin)

    def _valid_tokens(self, batch: Batch) -> Tensor:
        """Tokens that count in the loss of the whole step: an fp64 scalar."""
        first = group_rank(self.parallel.context_group) == 0
        tokens = torch.full((), batch.valid_tokens if first else 0, dtype=torch.float64, device=self.parallel.device)
        return _sum_over_ranks(tokens, self.parallel)

    def _step_partitioned(self) -> float:
        """Let DeepSpeed clip and step; returns the gradient's norm before that, NaN where it has left the step out."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.nan

    def _step_replicated(self) -> float:
        """The same for ZeRO-0, where DeepSpeed takes a gradient as it is: no norm, no clipping, no check."""
        grads = [w.parameter.grad for w in self._weights if w.parameter.grad is not None]
        first = group_rank(self.parallel.tensor_group) == 0
        counted = [
            w.parameter.grad
            for w in self._weights
            if w.parameter.grad is not None and (first or w.shard_dim is not None)
        ]
        squares = torch.stack(torch._foreach_norm(counted)).double().square().sum()
        dist.all_reduce(squares, group=self.parallel.tensor_group)
        norm = math.sqrt(float(squares))
        if not math.isfinite(norm):
            self._engine.optimizer.zero_grad()
            return norm
        if self._clip_grad:
            torch._foreach_mul_(grads, min(1.0, self._clip_grad / (norm + 1e-6)))
        self._engine.step()
        return norm


@dataclass(frozen=True)
class _Weight:
    """A parameter, and how this rank's slice of it fits into the whole."""

    name: str
    parameter: torch.nn.Parameter
    shard_dim: int | None
    """The dimension that the tensor-parallel ranks share; None: each holds all of it."""
    local_shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    origin: tuple[int, ...]


def _describe_weights(model: Llama) -> list[_Weight]:
    modules = dict(model.named_modules())
    weights = []
    for name, parameter in model.named_parameters():
        module = modules[name.rpartition(".")[0]]
        dim = module.shard_dim if isinstance(module, ShardedWeight) else None
        full, origin = list(parameter.shape), [0] * parameter.ndim
        if dim is not None:
            full[dim] *= model.tp.size
            origin[dim] = model.tp.rank * parameter.shape[dim]
        weights.append(_Weight(name, parameter, dim, tuple(parameter.shape), tuple(full), tuple(origin)))
    return weights


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
    """The sum of a scalar over the ranks that report losses, on every rank."""
    total = value.clone() if parallel.reports_losses else torch.zeros_like(value)
    dist.all_reduce(total)
    return total


class _Groups:
    """The ranks around this one, as DeepSpeed asks for them: it counts those that share a sequence, which hold the same
    weights, among the data-parallel ones."""

    def __init__(self, parallel: ParallelState) -> None:
        self._tensor = parallel.tensor_group
        self._data: ProcessGroup = parallel.mesh.get_group(
            "replicate" if parallel.config.sharding == "no_shard" else "shard"
        )

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()
