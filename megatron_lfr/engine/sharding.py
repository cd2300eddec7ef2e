"""Shards models over data-parallel ranks by FSDP2, and describes which part of each weight a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatron_lfr.model.decoder import Decoder
from megatron_lfr.parallel.config import ShardingStrategy
from megatron_lfr.parallel.groups import ParallelState
from megatron_lfr.parallel.layers import partial_gradients, shard_dims


def shard_stages(stages: list[Decoder], parallel: ParallelState, seed: int | None) -> list[Decoder]:
    """Shard stages of `build_stages` over the data-parallel ranks and give them memory; returns them. No rank computes
    or holds more than its shards of the initial weights at any time. If seed is None, the weights stay undefined, for
    a checkpoint to replace."""
    for model in stages:
        _shard(model, parallel)
        model.empty_on(parallel.device)
        if seed is not None:
            model.init_weights(seed)
    return stages


def _shard(model: Decoder, parallel: ParallelState) -> None:
    """Shard a stage's weights, gradients and optimizer state over the data-parallel ranks, in place.

    Weights are gathered in the model's compute dtype, gradients summed in fp32. FSDP2 is also used for one rank, and
    for no_shard, where each shard is a complete copy.
    """
    dtype = None if model.compute_dtype == torch.float32 else model.compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = parallel.sharding_mesh
    reshard = parallel.config.sharding == "optim_grads_params"
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # A backward pass first needs what is in the group of the model itself: the embeddings. So they stay gathered.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if mesh.size() > 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):  # the loss is already normalised: plain sums
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class ShardedSynchronization:
    """Decides when FSDP2 sums gradients over the ranks, and frees the weights that it has gathered."""

    model: Decoder
    sharding: ShardingStrategy

    def before_micro_batch(self, is_last: bool) -> None:
        """Set what follows this micro-batch: ZeRO-1 sums once a step, ZeRO-2 and ZeRO-3 after every micro-batch; only
        ZeRO-3 frees the gathered weights in between."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(is_last or self.sharding in ("optim_grads", "optim_grads_params"))
        self.model.set_reshard_after_backward(is_last or self.sharding == "optim_grads_params")

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ShardedParameter:
    """A weight after `shard_stages`: the part that this rank holds, and its position in the full weight."""

    name: str
    """Name of the weight, the same in every layout."""
    parameter: nn.Parameter
    """FSDP2's parameter: a DTensor over the sharding mesh."""
    full_shape: torch.Size
    """Shape of the full weight, with a padded vocabulary."""
    placements: tuple[Placement, Placement]
    """How it is spread over the storage mesh, tensor × shard."""
    is_first_copy: bool
    """Whether this rank's part counts in norms: where several ranks hold the same part, only one of them counts it."""

    has_partial_gradient: bool
    """Whether the tensor-parallel ranks, which all hold this part, each have a part of its gradient after the backward:
    `partial_gradients`."""

    def local(self) -> Tensor:
        """Return this rank's part; not a copy."""
        assert isinstance(self.parameter, DTensor)
        return self.parameter.to_local().detach()

    def local_grad(self) -> Tensor:
        """Return this rank's part of the gradient; zero where the loss does not depend on the weight."""
        grad = self.parameter.grad
        if grad is None:
            self.parameter.grad = grad = torch.zeros_like(self.parameter)
        assert isinstance(grad, DTensor)
        return grad.to_local()

    def as_full(self, part: Tensor, parallel: ParallelState) -> DTensor:
        """Return the full tensor of which every rank holds a `part` of the shape of `local()`; shares its memory."""
        stride = torch.empty(self.full_shape, device="meta").stride()
        return DTensor.from_local(
            part, parallel.storage_mesh, self.placements, run_check=False, shape=self.full_shape, stride=stride
        )


def sharded_parameters(stages: Sequence[Decoder], parallel: ParallelState) -> list[ShardedParameter]:
    """List the weights that this rank has a part of, in all its stages, frozen ones too."""
    first_replica = parallel.mesh.get_local_rank("replicate") == 0
    first_tensor_rank = parallel.mesh.get_local_rank("tensor") == 0
    parameters = []
    for model in stages:
        dims, partial = shard_dims(model), partial_gradients(model, model.tp)
        for name, parameter in model.named_parameters():
            shape, dim = list(parameter.shape), dims[name]
            if dim is not None:
                shape[dim] *= model.tp.size
            is_tied_copy = name == "embedding.weight" and not model.stage.is_first
            parameters.append(
                ShardedParameter(
                    name,
                    parameter,
                    torch.Size(shape),
                    (Replicate() if dim is None else Shard(dim), Shard(0)),
                    first_replica and not is_tied_copy and (dim is not None or first_tensor_rank),
                    name in partial,
                )
            )
    return parameters


def reshard(stages: Sequence[Decoder]) -> None:
    """Free weights that an evaluation has left gathered: they would be stale once the shards are written to."""
    for module in (module for stage in stages for module in stage.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()
