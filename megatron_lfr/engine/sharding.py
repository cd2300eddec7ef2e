"""Data-parallel sharding by FSDP2, and each weight as the whole of which ranks hold parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatron_lfr.model.llama import Llama
from megatron_lfr.parallel.config import ShardingStrategy
from megatron_lfr.parallel.groups import ParallelState
from megatron_lfr.parallel.layers import ShardedWeight


def shard_stages(stages: list[Llama], parallel: ParallelState, seed: int | None) -> list[Llama]:
    """Give stages that `build_stages` made their memory, spread over the data-parallel ranks; returns them. No rank
    draws, or holds at any time, more than its shards of the initial weights. seed None leaves the weights undefined,
    for a checkpoint to be loaded."""
    for model in stages:
        _shard(model, parallel)
        model.empty_on(parallel.device)
        if seed is not None:
            model.init_weights(seed)
    return stages


def _shard(model: Llama, parallel: ParallelState) -> None:
    """Spread a stage's weights, gradients and optimizer state over the data-parallel ranks, in place.

    Weights are gathered in the model's compute dtype, gradients summed in fp32. One rank goes the same way, and so
    does no_shard, whose shards are whole copies.
    """
    dtype = None if model.compute_dtype == torch.float32 else model.compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = parallel.sharding_mesh
    reshard = parallel.config.sharding == "optim_grads_params"
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The first thing that a backward needs again is what the whole model's own group holds: the embeddings.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if mesh.size() > 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):  # the loss has its normaliser already: plain sums
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class ShardedSynchronization:
    """When FSDP2 sums gradients over the ranks, and gives up the weights that it has gathered."""

    model: Llama
    sharding: ShardingStrategy

    def before_micro_batch(self, is_last: bool) -> None:
        """ZeRO-1 sums once a step, the others after every micro-batch; ZeRO-3 alone gives up the gathered weights in
        between."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(is_last or self.sharding in ("optim_grads", "optim_grads_params"))
        self.model.set_reshard_after_backward(is_last or self.sharding == "optim_grads_params")

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ShardedParameter:
    """A weight after `shard_stages`: what this rank holds of it, and how that fits into the whole."""

    name: str
    """The same in every layout."""
    parameter: nn.Parameter
    """FSDP2's: a DTensor over the sharding mesh."""
    full_shape: torch.Size
    """Of the whole weight, its vocabulary padded."""
    placements: tuple[Placement, Placement]
    """Over the storage mesh, tensor × shard."""
    is_first_copy: bool
    """Whether this rank's part counts in norms: of the ranks that hold the same part, one does."""

    @property
    def is_replicated(self) -> bool:
        """Whether every tensor-parallel rank holds all of it."""
        return self.placements[0].is_replicate()

    def local(self) -> Tensor:
        """This rank's part, not a copy."""
        assert isinstance(self.parameter, DTensor)
        return self.parameter.to_local().detach()

    def local_grad(self) -> Tensor:
        """The gradient's part; zero where the loss does not depend on the weight."""
        grad = self.parameter.grad
        if grad is None:
            self.parameter.grad = grad = torch.zeros_like(self.parameter)
        assert isinstance(grad, DTensor)
        return grad.to_local()

    def whole(self, part: Tensor, parallel: ParallelState) -> DTensor:
        """The tensor of which every rank holds `part`, shaped as `local()` is; shares its memory."""
        stride = torch.empty(self.full_shape, device="meta").stride()
        return DTensor.from_local(
            part, parallel.storage_mesh, self.placements, run_check=False, shape=self.full_shape, stride=stride
        )


def sharded_parameters(stages: Sequence[Llama], parallel: ParallelState) -> list[ShardedParameter]:
    """The weights that this rank has a part of, over all its stages."""
    first_replica = parallel.mesh.get_local_rank("replicate") == 0
    first_tensor_rank = parallel.mesh.get_local_rank("tensor") == 0
    parameters = []
    for model in stages:
        modules = dict(model.named_modules())
        for name, parameter in model.named_parameters():
            module = modules[name.rpartition(".")[0]]
            shape = list(parameter.shape)
            dim = module.shard_dim if isinstance(module, ShardedWeight) else None
            if dim is not None:
                shape[dim] *= model.tp.size
            is_tied_copy = module is model.embedding and not model.stage.is_first
            parameters.append(
                ShardedParameter(
                    name,
                    parameter,
                    torch.Size(shape),
                    (Replicate() if dim is None else Shard(dim), Shard(0)),
                    first_replica and not is_tied_copy and (dim is not None or first_tensor_rank),
                )
            )
    return parameters


def reshard(stages: Sequence[Llama]) -> None:
    """Give up weights that an evaluation has left gathered: they would outlive what is written to the shards."""
    for module in (module for stage in stages for module in stage.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()
