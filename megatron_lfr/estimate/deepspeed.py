"""The most memory that a rank holds at a time under DeepSpeed, for each stage of ZeRO and what is offloaded.

As for the native engine, the peak is at one of a few moments: the loss, when all activations exist; the last layer's
backward; at stage 3 the first layer's forward, which fetches weights for those after it; and the end of a step, when
gradients are summed and flattened. Sizes of buffers are those of DeepSpeed 0.19.8, by reading it and by measuring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lfr.estimate.activations import (
    MicroBatch,
    backward_bytes,
    logits_peak,
    recomputed_bytes,
    stage_bytes,
)
from megatron_lfr.estimate.memory import HeldWeights, RankMemory, share_of, trained_and_frozen
from megatron_lfr.model.lora import adapter_factors
from megatron_lfr.parallel.config import ParallelConfig
from megatron_lfr.parallel.pipeline import make_stage

_BUCKET, _PREFETCH, _LIVE = 500_000_000, 50_000_000, 1_000_000_000
"""DeepSpeed's defaults: elements of a bucket, of weights that are fetched ahead, and that stay gathered."""


@dataclass(frozen=True)
class _Sizes:
    """Elements and bytes of an element that all parts are made of; the elements are those of weights that are
    trained."""

    stage: int
    total: int
    """Elements of the rank's weights before they are sharded."""
    shard: int
    largest: int
    """Elements of the largest weight."""
    itemsize: int
    """Bytes of an element of the weights that the model computes with."""
    is_offloaded: bool
    """Whether the optimizer is."""
    accumulates: bool
    """Whether a step has several micro-batches."""

    @property
    def is_half(self) -> bool:
        return self.itemsize == 2


def deepspeed_memory(
    batch: MicroBatch, layout: ParallelConfig, micro_batches: int, ranks: int, settings: Mapping[str, Any]
) -> RankMemory:
    """Estimate the memory of a rank with `micro_batches` a step. `ranks` is the number of data-parallel times
    context-parallel ranks; `settings` is what DeepSpeed is given."""
    zero = settings["zero_optimization"]
    model, stage = batch.model, make_stage(batch.model.num_layers)
    trained, frozen = trained_and_frozen(batch, [stage])
    sizes = _Sizes(
        stage=zero["stage"],
        total=trained.total,
        shard=share_of(trained.total, ranks) if zero["stage"] else trained.total,
        largest=_largest(batch, trained),
        itemsize=2 if settings.get("bf16", {}).get("enabled") else 4,
        is_offloaded="offload_optimizer" in zero,
        accumulates=micro_batches > 1,
    )
    tables = 2 * 4 * model.max_position_embeddings * model.head_dim
    weights, optimizer, constant, host = _constant_parts(sizes, "offload_param" in zero)
    weights += batch.itemsize * frozen.total
    bucket = _bucket(sizes, zero)
    if sizes.stage == 3:
        constant, bucket = constant + bucket, 0
    earlier, final = _gradients(sizes)
    gathered = _gathered(sizes, zero, trained, batch)
    activations = stage_bytes(batch, stage) + recomputed_bytes(batch)
    logits = logits_peak(batch)
    working = backward_bytes(batch) + sizes.itemsize * (trained.one_layer + trained.output)
    fetched = sizes.itemsize * min(sizes.total, zero.get("stage3_prefetch_bucket_size", _PREFETCH))
    moments = (
        gathered + earlier + bucket + activations + logits,
        gathered + earlier + bucket + activations + working,
        gathered + fetched if sizes.stage == 3 else 0,
        gathered + bucket + final,
    )
    return RankMemory(
        weights=weights + tables,
        gathered=gathered,
        gradients=constant + bucket + max(earlier, final),
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        peak=weights + tables + optimizer + constant + max(moments),
        host=host,
    )


def _largest(batch: MicroBatch, trained: HeldWeights) -> int:
    if batch.has_adapters:
        return max(map(max, adapter_factors(batch.model, batch.lora, batch.tensor_ranks)))
    return max(trained.output, batch.model.hidden_size * batch.model.ffn_size // batch.tensor_ranks)


def _constant_parts(sizes: _Sizes, offloads_weights: bool) -> tuple[int, int, int, int]:
    """Return the bytes of weights, of the optimizer's state, of gradients that are kept between steps, and of the
    host's memory."""
    shard = sizes.shard
    if sizes.stage == 0:
        return 4 * sizes.total, 8 * sizes.total, 0, 0
    model = sizes.itemsize * (shard if sizes.stage == 3 else sizes.total)
    master, state = 4 * shard, 8 * shard
    if not sizes.is_offloaded:
        host = model if offloads_weights else 0
        kept = 4 * (sizes.total if sizes.stage == 1 and sizes.is_half else shard if sizes.stage == 3 else 0)
        return model - host + master, state, kept, host
    if sizes.stage == 3:  # and fp32 gradients twice: as they are summed, and as the optimizer takes them
        host = master + state + 8 * shard + (model if offloads_weights else 0)
        return 0 if offloads_weights else model, 0, 0, host
    # The host has the weights once more as the model takes them, and a gradient of the largest one.
    sums = 4 * shard * (2 if sizes.accumulates and (sizes.stage == 2 or sizes.is_half) else 1)
    host = master + state + sums + sizes.itemsize * (shard + sizes.largest)
    return model, 0, sizes.itemsize * sizes.largest, host


def _bucket(sizes: _Sizes, zero: Mapping[str, Any]) -> int:
    """Return the bytes of the buffers that gradients are summed in."""
    if sizes.stage == 0 or not zero.get("contiguous_gradients", True):
        return 0
    if sizes.stage == 1 and sizes.is_half and not sizes.is_offloaded:
        return 0
    elements = zero.get("reduce_bucket_size", _BUCKET)
    if sizes.stage == 3:
        return 4 * int(elements)
    itemsize = 4 if sizes.stage == 1 else sizes.itemsize
    return int(itemsize * elements * (2 if zero.get("overlap_comm") else 1))


def _gradients(sizes: _Sizes) -> tuple[int, int]:
    """Return the bytes of gradients at the loss of the last micro-batch, and at the end of the step."""
    total, shard = sizes.total, sizes.shard
    flattened = 4 * min(total, _BUCKET)  # copies, where gradients are not summed as they come
    if sizes.stage == 0:
        earlier, final = 4 * total, 4 * total + flattened
    elif sizes.stage == 1 and sizes.is_half and not sizes.is_offloaded:
        earlier, final = 2 * total, 2 * total + flattened
    elif sizes.stage == 1:
        earlier = sizes.itemsize * total
        final = earlier + (4 * total if sizes.is_half else 4 * shard if not sizes.is_offloaded else 0)
    elif sizes.stage == 2:
        earlier, final = (0, 4 * total) if sizes.is_offloaded else (4 * shard, 8 * shard)
    else:
        earlier, final = 0, 4 * sizes.largest
    return earlier if sizes.accumulates else 0, final


def _gathered(sizes: _Sizes, zero: Mapping[str, Any], trained: HeldWeights, batch: MicroBatch) -> int:
    """Return the bytes of weights that are gathered, or cast for the layers, and kept until their backward."""
    if sizes.stage == 3:
        return int(sizes.itemsize * min(sizes.total, zero.get("stage3_max_live_parameters", _LIVE)))
    is_cast = sizes.stage == 0 and batch.itemsize == 2 and batch.recompute != "full"
    return 2 * trained.layers if is_cast else 0
