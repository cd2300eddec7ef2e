"""The most memory that a rank holds at a time, part by part, for the native engine.

Some moments of a step's last micro-batch come into question: the loss, when all activations are there; the backward of
the last layer, which adds that layer's gradients; that of the first one, when most gradients are there; and the end,
when those of the embeddings are on their way too. In between, the sum moves evenly from one to the other. FSDP2 keeps
whole copies of the weights in the compute dtype beside its shards, on one rank too.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from megatron_lfr.parallel.config import ParallelConfig
from megatron_lfr.parallel.pipeline import Stage, local_stages


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank; each part where it is largest. They are not all there at once: `peak` is the largest sum."""

    weights: int
    """fp32 shards, and the tables of the rotary positions."""
    gathered: int
    """Whole weights in the compute dtype."""
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    activations: int
    """What autograd keeps of all micro-batches in flight, and what is recomputed of a layer."""
    logits: int
    """Logits, their gradient, and the products made of it."""
    peak: int


@dataclass(frozen=True)
class _Weights:
    """Elements of a rank's weights, whole, as its tensor-parallel layers hold them."""

    layers: int
    one_layer: int
    embeddings: int
    """Of what is not in a layer."""
    output: int
    """Of the output embedding, if the loss is computed here."""
    tied: int
    """The same, where it is the input embedding too: two gradients are added up."""

    @property
    def total(self) -> int:
        return self.layers + self.embeddings


def micro_batch(config: RunConfig, model: ModelConfig) -> MicroBatch:
    """What the ranks of a run compute at a time. A GPU is meant, unless --distributed-backend is gloo."""
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
        on_gpu=on_gpu,
    )


def rank_memory(batch: MicroBatch, layout: ParallelConfig, micro_batches: int, ranks: int, rank: int) -> RankMemory:
    """Of pipeline rank `rank`, with `micro_batches` a step; `ranks`: data-parallel times context-parallel ones."""
    model, e = batch.model, batch.itemsize
    stages = local_stages(
        model.num_layers, layout.num_stages(model.num_layers), rank, layout.pipeline_model_parallel_size
    )
    held = _weights(model, stages, layout.tensor_model_parallel_size)
    shards = 1 if layout.sharding == "no_shard" else ranks // layout.num_distributed_optimizer_instances
    sharded = layout.sharding in ("optim_grads", "optim_grads_params")
    weights = 4 * _share(held.total, shards) + 2 * 4 * model.max_position_embeddings * model.head_dim * len(stages)
    optimizer = 8 * _share(held.total, shards)

    gathered = e * held.total
    if layout.sharding == "optim_grads_params":
        gathered = e * (held.embeddings + min(2 * held.one_layer, held.layers))
    # From earlier micro-batches: whole, until the last one, or summed into the shards at once.
    earlier = 0 if micro_batches == 1 else 4 * (_share(held.total, shards) if sharded else held.total)
    in_flight = micro_batches_in_flight(layout, micro_batches, stages, rank)
    kept = sum(number * stage_bytes(batch, stage) for number, stage in zip(in_flight, stages, strict=True))
    kept += _pipeline_buffers(batch, stages, in_flight, micro_batches)
    logits = 0
    if stages[-1].is_last:
        logits = logits_peak(batch) + (in_flight[-1] - 1) * logits_kept(batch)

    # A group of weights is done: its gradients as they come, in fp32 to be summed, and, of several ranks, their shards.
    reduced = e + 4 + (4 / shards if shards > 1 else 0)
    again, layer = recomputed_bytes(batch), layer_bytes(batch)
    working = again + backward_bytes(batch) + e * (held.one_layer + held.output)
    rest = held.one_layer + held.embeddings
    # The gradients of the other layers are summed when the first one's are computed.
    summed = 4 * _share(held.total if sharded and micro_batches > 1 else held.layers - held.one_layer, shards)
    waiting = 0 if micro_batches == 1 or sharded else 4
    own = 4 * _share(held.layers, shards) + int(reduced * held.embeddings) + 2 * e * held.tied
    own += waiting * held.embeddings + (4 * _share(held.embeddings, shards) if sharded and micro_batches > 1 else 0)
    moments = (
        gathered + earlier + kept + logits,  # the loss
        gathered + earlier + kept + working,  # in the last layer's backward
        gathered + earlier + kept - layer + e * held.output + int((reduced - e) * held.one_layer),  # behind it
        (e + waiting) * rest + summed + layer + working,  # in the first layer's backward
        e * held.embeddings + own,  # at the end
    )
    return RankMemory(
        weights=weights,
        gathered=gathered,
        gradients=max(earlier + e * held.output + int(reduced * held.one_layer), own),
        optimizer=optimizer,
        activations=kept + again,
        logits=logits,
        peak=weights + optimizer + max(moments),
    )


def _weights(model: ModelConfig, stages: list[Stage], tensor_ranks: int) -> _Weights:
    hidden = model.hidden_size
    matrices = 2 * (model.num_attention_heads + model.query_groups) * model.head_dim + 3 * model.ffn_size
    one_layer = hidden * matrices // tensor_ranks + 2 * hidden
    vocabulary = model.padded_vocab_size // tensor_ranks * hidden
    is_tied = not model.untie_embeddings_and_output_weights
    embeddings = output = 0
    for stage in stages:
        if stage.is_first or (stage.is_last and is_tied):
            embeddings += vocabulary
        if stage.is_last:
            embeddings += hidden + (0 if is_tied else vocabulary)
            output = vocabulary
    layers = sum(stage.end_layer - stage.first_layer for stage in stages) * one_layer
    tied = vocabulary if is_tied and stages[0].is_first and stages[-1].is_last else 0
    return _Weights(layers, one_layer, embeddings, output, tied)


def micro_batches_in_flight(layout: ParallelConfig, micro_batches: int, stages: list[Stage], rank: int) -> list[int]:
    """For each stage, how many micro-batches have gone forward and not yet back, at most: PyTorch's schedules."""
    count = stages[0].count
    if count == 1:
        return [1]
    if layout.schedule == "gpipe":
        return [micro_batches]
    if layout.schedule == "1f1b":
        return [min(micro_batches, count - stages[0].index)]
    ranks = layout.pipeline_model_parallel_size
    per_round = micro_batches // max(1, micro_batches // ranks)
    passes = (len(stages) - 1) * per_round + 2 * (ranks - 1 - rank) + 1
    passes = min(passes, micro_batches * len(stages))
    # The passes begin with `per_round` of the first stage, then as many of the next, and so on, in rounds.
    done = [index // per_round % len(stages) for index in range(passes)]
    return [done.count(number) for number in range(len(stages))]


def _pipeline_buffers(batch: MicroBatch, stages: list[Stage], in_flight: list[int], micro_batches: int) -> int:
    """Room to receive every micro-batch's activations and gradients, and the outputs that wait for their backward."""
    buffers = 0
    for stage, number in zip(stages, in_flight, strict=True):
        buffers += 0 if stage.is_first else micro_batches
        buffers += 0 if stage.is_last else micro_batches + number
    return buffers * batch.hidden


def _share(elements: int, shards: int) -> int:
    return -(-elements // shards)
