"""The time of a training step on given hardware, from operations, memory traffic and messages.

An open model: every term is a count over a rate, and five numbers, which `tools/planner_validation.py` fits, say which
share of its data sheet the hardware reaches. It leaves out the launch of kernels (models far below 1B parameters), the
host, stragglers, and contention between overlapping parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_lfr.model.config import ModelConfig
from megatron_lfr.parallel.config import ShardingStrategy
from megatron_lfr.parallel.devices import Device

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Constants:
    """The fitted numbers."""

    matrices: float
    """Share of the peak that matrix products reach."""
    attention: float
    """Share of the peak that FlashAttention reaches, of whose products a causal mask leaves half."""
    memory: float
    """Share of the memory's bandwidth that everything else reaches."""
    network: float
    """Share of the bandwidth of links and network that collectives reach."""
    overlap: float
    """Share of the computation beside which gradients are summed and weights gathered."""


CONSTANTS = Constants(matrices=0.912, attention=0.273, memory=0.401, network=0.906, overlap=0.0)
"""From the tables of llm-foundry; docs/planner.md shows what they predict of others."""
LATENCY = 1e-5
"""Seconds of each step of a ring, or of a message."""


@dataclass(frozen=True)
class Hardware:
    """A device, and how many of them are in a node."""

    device: Device
    gpus_per_node: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that matter to its speed."""

    layers: int
    hidden: int
    queries: int
    """Channels of all query heads."""
    keys: int
    """Channels of all key heads."""
    ffn: int
    is_gated: bool
    """Whether the feed-forward has three matrices (SwiGLU) instead of two."""
    vocabulary: int
    is_tied: bool = False
    materializes_scores: bool = False
    """Whether attention writes its score matrix to memory, and computes all of it, as before FlashAttention."""

    @property
    def layer_weights(self) -> int:
        """Number of weights of the matrices of a layer."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        return attention + (3 if self.is_gated else 2) * self.hidden * self.ffn

    @property
    def weights(self) -> int:
        """Number of all weights, without norms."""
        return self.layers * self.layer_weights + (2 - self.is_tied) * self.vocabulary * self.hidden


def shape_of(model: ModelConfig) -> Shape:
    """Return the sizes of a Llama."""
    return Shape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        queries=model.num_attention_heads * model.head_dim,
        keys=model.query_groups * model.head_dim,
        ffn=model.ffn_size,
        is_gated=True,
        vocabulary=model.padded_vocab_size,
        is_tied=not model.untie_embeddings_and_output_weights,
    )


@dataclass(frozen=True)
class Layout:
    """How a step is spread over ranks."""

    seq_length: int
    micro_batch: int
    micro_batches: int
    """Of a step, on each data-parallel rank."""
    data: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    stages_per_rank: int = 1
    context: int = 1
    sharding: ShardingStrategy = "no_shard"
    recompute: Recompute = "none"
    is_compiled: bool = False

    @property
    def ranks(self) -> int:
        """Number of all ranks."""
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank."""
        return self.micro_batch * self.seq_length // self.context

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.micro_batch * self.seq_length * self.micro_batches * self.data


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step, in parts that add up."""

    matrices: float
    attention: float
    memory: float
    """All that is limited by the memory's bandwidth: norms, activations, residuals, logits."""
    tensor: float
    """Messages between tensor-parallel and context-parallel ranks."""
    pipeline: float
    """Messages between stages."""
    bubble: float
    data: float
    """The part of summing gradients and gathering weights that is not hidden."""
    optimizer: float

    @property
    def total(self) -> float:
        parts = (self.matrices, self.attention, self.memory, self.tensor, self.pipeline)
        return sum(parts) + self.bubble + self.data + self.optimizer


def step_time(shape: Shape, layout: Layout, hardware: Hardware, constants: Constants = CONSTANTS) -> StepTime:
    """Predict the time of a step of the slowest stage: one with an equal share of the layers, and the loss."""
    n, micro_batches = layout.tokens, layout.micro_batches
    layers = math.ceil(shape.layers / layout.pipeline)
    passes = 3 + (layout.recompute == "full")  # forward, two products in backward, and forward again
    loss_share = 1 / layout.pipeline  # the others wait for it no longer than a pipeline's ranks share it
    weights = layers * passes * shape.layer_weights + 3 * loss_share * shape.vocabulary * shape.hidden
    peak = hardware.device.bf16_tflops * 1e12
    matrices = 2 * n * weights / layout.tensor / (constants.matrices * peak)
    attention = layers * _attention(shape, layout, hardware, constants)
    memory = (layers * _layer_bytes(shape, layout) + loss_share * 16 * n * shape.vocabulary / layout.tensor) / (
        constants.memory * hardware.device.memory_gb_per_second * 1e9
    )
    tensor = layers * _tensor_seconds(shape, layout, hardware, constants)
    computing = micro_batches * (matrices + attention + memory + tensor)
    rounds = micro_batches * layout.stages_per_rank
    return StepTime(
        matrices=micro_batches * matrices,
        attention=micro_batches * attention,
        memory=micro_batches * memory,
        tensor=micro_batches * tensor,
        pipeline=_pipeline_seconds(shape, layout, hardware, constants),
        bubble=computing * (layout.pipeline - 1) / rounds,
        data=_data_seconds(shape, layout, hardware, constants, matrices + attention + memory),
        optimizer=_optimizer_seconds(shape, layout, hardware, constants),
    )


def _attention(shape: Shape, layout: Layout, hardware: Hardware, constants: Constants) -> float:
    """Return the seconds of a layer's attention for a micro-batch, forward and backward."""
    keys = layout.seq_length if shape.materializes_scores else layout.seq_length / 2
    forward = 4 * layout.tokens * keys * shape.queries / layout.tensor
    # FlashAttention's backward has five products for the two of its forward (Dao 2023, arXiv 2307.08691).
    passes = 1 + (2 if shape.materializes_scores else 2.5) + (layout.recompute != "none")
    share = constants.matrices if shape.materializes_scores else constants.attention
    return passes * forward / (share * hardware.device.bf16_tflops * 1e12)


def _layer_bytes(shape: Shape, layout: Layout) -> float:
    """Return the bytes that a layer's forward and backward read and write beside the products' own, in bf16.

    Forward, reads and writes of elements: two norms 4 and two sums 6 of the residual stream, inputs and outputs of the
    products 4; 5 of queries and of keys and values (rotary positions, attention); 6 of the feed-forward with a gate, 4
    without. A compiler merges norms with sums, and the gate's products with its activation.
    """
    between = layout.tokens / (layout.tensor if layout.sequence_parallel else 1)
    hidden = (6 if layout.is_compiled else 10) * between + 4 * layout.tokens
    inner = 5 * (shape.queries + 2 * shape.keys) + (6 if shape.is_gated else 4) * shape.ffn
    forward = 2 * (hidden * shape.hidden + inner * layout.tokens / layout.tensor)
    scores = 0.0
    if shape.materializes_scores:
        # Written once, masked softmax and dropout read and write them twice, and the product reads them.
        heads = shape.queries / 128
        scores = 2 * 6 * layout.tokens * layout.seq_length * heads / layout.tensor
    return (forward + scores) * (3 + (layout.recompute == "full")) + scores * (layout.recompute == "selective")


def bus_gb_per_second(group: int, stride: int, hardware: Hardware) -> float:
    """Return the bandwidth in GB/s that each rank of a ring has: `group` ranks, `stride` apart. Within a node it is
    that of its links; between nodes, the members of the ring in a node share their network ports."""
    local = max(1, min(group, hardware.gpus_per_node // stride))
    if group <= local:
        return hardware.device.link_gb_per_second
    return min(hardware.device.link_gb_per_second, local * hardware.device.network_gb_per_second)


def _ring(size: float, group: int, stride: int, hardware: Hardware, constants: Constants) -> float:
    """Return the seconds in which a group gathers, or sums and scatters, `size` bytes."""
    if group == 1:
        return 0.0
    rate = constants.network * bus_gb_per_second(group, stride, hardware) * 1e9
    return size * (group - 1) / group / rate + (group - 1) * LATENCY


def _tensor_seconds(shape: Shape, layout: Layout, hardware: Hardware, constants: Constants) -> float:
    """Return the seconds of a layer's messages for a micro-batch: two all-reduces in each direction between the
    tensor-parallel ranks (Shoeybi et al. 2019, arXiv 1909.08053), or as many gathers and scatters; keys and values
    between the context-parallel ones, gathered in forward, summed in backward."""
    repeats = 2 + (layout.recompute == "full")
    hidden = 2 * layout.tokens * shape.hidden
    tensor = 4 * repeats * _ring(hidden, layout.tensor, 1, hardware, constants)
    values = 2 * layout.tokens * layout.context * 2 * shape.keys / layout.tensor
    return tensor + repeats * _ring(values, layout.context, layout.tensor, hardware, constants)


def _pipeline_seconds(shape: Shape, layout: Layout, hardware: Hardware, constants: Constants) -> float:
    if layout.pipeline == 1:
        return 0.0
    stride = layout.tensor * layout.context * layout.data
    size = 2 * layout.tokens * shape.hidden / (layout.tensor if layout.sequence_parallel else 1)
    is_local = stride * 2 <= hardware.gpus_per_node
    device = hardware.device
    rate = constants.network * 1e9 * (device.link_gb_per_second if is_local else device.network_gb_per_second)
    return 2 * layout.micro_batches * layout.stages_per_rank * (size / rate + LATENCY)


def _data_seconds(shape: Shape, layout: Layout, hardware: Hardware, constants: Constants, micro_batch: float) -> float:
    """Return the seconds of summing gradients (fp32) and gathering weights (bf16) that computation does not hide.

    micro_batch: seconds of computing one. Sharded weights are gathered in forward and backward of each micro-batch, and
    sharded gradients summed in each; else, once a step, beside the last backward and the first forward.
    """
    group, stride = layout.data * layout.context, layout.tensor
    weights = shape.layers * shape.layer_weights / layout.pipeline / layout.tensor
    weights += (2 - shape.is_tied) * shape.vocabulary * shape.hidden / layout.tensor / layout.pipeline
    buckets = math.ceil(shape.layers / layout.pipeline)  # a layer's weights travel together

    def seconds(size: float) -> float:
        return buckets * _ring(size / buckets, group, stride, hardware, constants)

    gather, reduce = seconds(2 * weights), seconds(4 * weights)
    hidden = constants.overlap * micro_batch
    match layout.sharding:
        case "optim_grads_params":
            return layout.micro_batches * max(0.0, 2 * gather + reduce - hidden)
        case "optim_grads":
            return max(0.0, layout.micro_batches * (reduce - hidden * 2 / 3)) + max(0.0, gather - hidden / 3)
        case "optim":
            return max(0.0, reduce + gather - hidden)
        case _:
            return max(0.0, 2 * reduce - hidden * 2 / 3)


def _optimizer_seconds(shape: Shape, layout: Layout, hardware: Hardware, constants: Constants) -> float:
    """Return the seconds of AdamW with clipping: weights, gradients and moments in fp32, 44 bytes a weight."""
    shards = 1 if layout.sharding == "no_shard" else layout.data * layout.context
    weights = shape.weights / layout.pipeline / layout.tensor / shards
    return 44 * weights / (constants.memory * hardware.device.memory_gb_per_second * 1e9)
