"""The most memory that a rank holds at a time, part by part, for the native engine.

The peak is at one of a few moments of a step's last micro-batch: the loss, when all activations exist; the backward of
the last layer, which adds that layer's gradients; the backward of the first layer, when most gradients exist; and the
end, which adds the gradients of the embeddings. Between these moments, the sum changes steadily. FSDP2 keeps unsharded
copies of the weights in the compute dtype beside its shards, even on a single rank. Where adapters are trained, the
model is held in the compute dtype, and only they have gradients and moments.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from megatron_lfr.config import RunConfig
from megatron_lfr.estimate.activations import (
    MicroBatch,
    backward_bytes,
    layer_bytes,
    logits_kept,
    logits_peak,
    recomputed_bytes,
    stage_bytes,
)
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.lora import adapter_factors
from megatron_lfr.parallel.config import ParallelConfig
from megatron_lfr.parallel.pipeline import Stage, local_stages


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank holds, each part when it is largest. The parts are not largest at once: `peak` is the largest
    sum."""

    weights: int
    """Shards of the weights in fp32, or in the compute dtype where they are frozen, and the tables of the rotary
    positions."""
    gathered: int
    """Unsharded weights in the compute dtype."""
    gradients: int
    optimizer: int
    """The two moments of AdamW."""
    activations: int
    """What autograd keeps of all micro-batches in flight, and what one layer recomputes."""
    logits: int
    """Logits, their gradient, and the gradients computed from it."""
    peak: int
    host: int = 0
    """Bytes in the host's memory that DeepSpeed offloads, which are in no other part."""


@dataclass(frozen=True)
class HeldWeights:
    """Number of elements of a rank's weights before they are sharded, as its tensor-parallel layers hold them."""

    layers: int
    one_layer: int
    embeddings: int
    """Elements outside the layers: embeddings and the final norm."""
    output: int
    """Elements of the output embedding, if this rank computes the loss, else 0."""
    tied: int
    """Elements of the output embedding where it is the input embedding as well, whose two gradients are added; else
    0."""

    @property
    def total(self) -> int:
        return self.layers + self.embeddings

    def __add__(self, other: HeldWeights) -> HeldWeights:
        return HeldWeights(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def micro_batch(config: RunConfig, model: ModelConfig) -> MicroBatch:
    """Return what a rank of a run computes at a time. It is estimated for a GPU, unless --distributed-backend is
    gloo."""
    layout = config.parallel
    on_gpu = layout.distributed_backend != "gloo"
    return MicroBatch(
        model=model,
        rows=config.training.micro_batch_size,
        seq_length=config.data.seq_length,
        tensor_ranks=layout.tensor_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        context_ranks=layout.context_parallel_size,
        itemsize=2 if config.training.bf16 else 4,
        recompute=config.training.recompute_granularity,
        has_positions=config.data.reset_position_ids,
        has_mask=config.data.reset_attention_mask,
        saves_logits=layout.schedule == "gpipe",
        attention_backend=config.attention_backend(on_gpu),
        dropout=config.dropout,
        lora=config.lora,
        on_gpu=on_gpu,
    )


def rank_memory(batch: MicroBatch, layout: ParallelConfig, micro_batches: int, ranks: int, rank: int) -> RankMemory:
    """Estimate the memory of pipeline rank `rank` with `micro_batches` a step. `ranks` is the number of data-parallel
    times context-parallel ranks."""
    model, e = batch.model, batch.itemsize
    stages = local_stages(
        model.num_layers, layout.num_stages(model.num_layers), rank, layout.pipeline_model_parallel_size
    )
    trained, frozen = trained_and_frozen(batch, stages)
    held = trained + frozen
    shards = 1 if layout.sharding == "no_shard" else ranks // layout.num_distributed_optimizer_instances
    sharded = layout.sharding in ("optim_grads", "optim_grads_params")
    tables = 2 * 4 * model.max_position_embeddings * model.head_dim * len(stages) if model.has_rope else 0
    weights = 4 * share_of(trained.total, shards) + e * share_of(frozen.total, shards) + tables
    optimizer = 8 * share_of(trained.total, shards)

    gathered = e * held.total
    if layout.sharding == "optim_grads_params":
        gathered = e * (held.embeddings + min(2 * held.one_layer, held.layers))
    # Gradients of earlier micro-batches: unsharded until the last one, or summed into the shards at once.
    earlier = 0 if micro_batches == 1 else 4 * (share_of(trained.total, shards) if sharded else trained.total)
    in_flight = micro_batches_in_flight(layout, micro_batches, stages, rank)
    kept = sum(number * stage_bytes(batch, stage) for number, stage in zip(in_flight, stages, strict=True))
    kept += _pipeline_buffers(batch, stages, in_flight, micro_batches)
    logits = 0
    if stages[-1].is_last:
        logits = logits_peak(batch) + (in_flight[-1] - 1) * logits_kept(batch)

    # After a group of weights, its gradients exist as computed, in fp32 for the sum, and on several ranks as shards.
    reduced = e + 4 + (4 / shards if shards > 1 else 0)
    again, layer = recomputed_bytes(batch), layer_bytes(batch)
    working = again + backward_bytes(batch) + e * (trained.one_layer + trained.output)
    # The gradients of the other layers are summed when the first one's are computed.
    summed = 4 * share_of(
        trained.total if sharded and micro_batches > 1 else trained.layers - trained.one_layer, shards
    )
    waiting = 0 if micro_batches == 1 or sharded else 4
    final = 4 * share_of(trained.layers, shards) + int(reduced * trained.embeddings) + 2 * e * trained.tied
    final += waiting * trained.embeddings
    final += 4 * share_of(trained.embeddings, shards) if sharded and micro_batches > 1 else 0
    after_last = e * trained.output + int(reduced * trained.one_layer) - e * held.one_layer
    in_first = e * (held.one_layer + held.embeddings) + waiting * (trained.one_layer + trained.embeddings)
    moments = (
        gathered + earlier + kept + logits,  # the loss
        gathered + earlier + kept + working,  # in the last layer's backward
        gathered + earlier + kept - layer + after_last,  # after it
        in_first + summed + layer + working,  # in the first layer's backward
        e * held.embeddings + final,  # at the end
    )
    return RankMemory(
        weights=weights,
        gathered=gathered,
        gradients=max(earlier + e * trained.output + int(reduced * trained.one_layer), final),
        optimizer=optimizer,
        activations=kept + again,
        logits=logits,
        peak=weights + optimizer + max(moments),
    )


def trained_and_frozen(batch: MicroBatch, stages: list[Stage]) -> tuple[HeldWeights, HeldWeights]:
    """Count the weights of a rank's stages that are trained, and those that are not: none, or all but the adapters."""
    model, none = batch.model, HeldWeights(0, 0, 0, 0, 0)
    held = held_weights(model, stages, batch.tensor_ranks)
    if not batch.has_adapters:
        return held, none
    one_layer = sum(map(sum, adapter_factors(model, batch.lora, batch.tensor_ranks)))
    layers = sum(stage.end_layer - stage.first_layer for stage in stages)
    return replace(none, layers=layers * one_layer, one_layer=one_layer), held


def held_weights(model: ModelConfig, stages: list[Stage], tensor_ranks: int) -> HeldWeights:
    """Count the weights of a rank's stages."""
    hidden = model.hidden_size
    one_layer = model.layer_parameters(tensor_ranks)
    vocabulary = model.padded_vocab_size // tensor_ranks * hidden
    is_tied = not model.untie_embeddings_and_output_weights
    embeddings = output = 0
    for stage in stages:
        if stage.is_first or (stage.is_last and is_tied):
            embeddings += vocabulary
        if stage.is_first and not model.has_rope:
            embeddings += model.max_position_embeddings * hidden
        if stage.is_last:
            embeddings += model.norm_parameters + (0 if is_tied else vocabulary)
            output = vocabulary
    layers = sum(stage.end_layer - stage.first_layer for stage in stages) * one_layer
    tied = vocabulary if is_tied and stages[0].is_first and stages[-1].is_last else 0
    return HeldWeights(layers, one_layer, embeddings, output, tied)


def micro_batches_in_flight(layout: ParallelConfig, micro_batches: int, stages: list[Stage], rank: int) -> list[int]:
    """Return for each stage the largest number of micro-batches that have been forward but not yet backward, under
    PyTorch's schedules."""
    count = stages[0].count
    if count == 1:
        return [1]
    if layout.schedule == "gpipe":
        return [micro_batches]
    if layout.schedule == "1f1b":
        return [min(micro_batches, count - stages[0].index)]
    ranks = layout.pipeline_model_parallel_size
    per_round = micro_batches // max(1, micro_batches // ranks)
    forwards = (len(stages) - 1) * per_round + 2 * (ranks - 1 - rank) + 1
    forwards = min(forwards, micro_batches * len(stages))
    # A rank runs `per_round` micro-batches forward through its first stage, then as many through the next, in rounds.
    done = [index // per_round % len(stages) for index in range(forwards)]
    return [done.count(number) for number in range(len(stages))]


def _pipeline_buffers(batch: MicroBatch, stages: list[Stage], in_flight: list[int], micro_batches: int) -> int:
    """Return the bytes of the buffers that receive every micro-batch's activations and gradients, and of the outputs
    that wait for their backward."""
    buffers = 0
    for stage, number in zip(stages, in_flight, strict=True):
        buffers += 0 if stage.is_first else micro_batches
        buffers += 0 if stage.is_last else micro_batches + number
    return buffers * batch.hidden


def share_of(elements: int, shards: int) -> int:
    """Return the elements of the largest shard."""
    return -(-elements // shards)
