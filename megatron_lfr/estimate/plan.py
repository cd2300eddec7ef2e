"""`megatron-lfr estimate --plan`: all legal layouts of a model on a cluster, ranked by their predicted step time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lfr.build import make_model_config, make_tokenizer
from megatron_lfr.config import RunConfig
from megatron_lfr.estimate.calibration import describe, fit, print_calibration, read_measurements
from megatron_lfr.estimate.layouts import layout_of, legal_layouts, read_device, shape_for
from megatron_lfr.estimate.memory import micro_batch, rank_memory
from megatron_lfr.estimate.options import Options, corpus_blocks, with_defaults
from megatron_lfr.estimate.step_time import (
    CONSTANTS,
    LATENCY,
    Constants,
    Hardware,
    Layout,
    StepTime,
    step_time,
)
from megatron_lfr.lfr import Ledger, Plan
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.output import print_table
from megatron_lfr.planning import make_new_plan

USABLE = 0.9
"""Share of the memory for tensors: the rest is the context's, communication buffers' and fragmentation's."""
SHOWN = 10
ORDER_SECONDS = {"learn": 4.6e-9, "focus": 8.5e-9, "review": 4.6e-9}
"""Seconds a block of making an order on two cores, in benchmarks/2026-11-21-phase-orders.md (100M blocks)."""


@dataclass(frozen=True)
class Candidate:
    """A layout, what it is predicted to take, and what it needs."""

    config: RunConfig
    layout: Layout
    time: StepTime
    memory: int
    """Bytes of tensors, on the fullest rank."""

    @property
    def communication(self) -> float:
        """Seconds of a step that ranks wait for messages."""
        return self.time.tensor + self.time.pipeline + self.time.data

    @property
    def name(self) -> str:
        """The layout in a few words."""
        layout = self.layout
        words = [f"TP{layout.tensor}", f"PP{layout.pipeline}"]
        if layout.stages_per_rank > 1:
            words.append(f"x{layout.stages_per_rank}")
        words += [f"CP{layout.context}", f"DP{layout.data}", layout.sharding, f"rows {layout.micro_batch}"]
        return " ".join(words) + ("" if layout.recompute == "none" else f" {layout.recompute} recomputation")

    @property
    def flags(self) -> str:
        """The flags of `train` that give this layout."""
        layout, parallel = self.layout, self.config.parallel
        words = [f"--micro-batch-size {layout.micro_batch}"]
        if layout.tensor > 1:
            words.append(f"--tensor-model-parallel-size {layout.tensor} --sequence-parallel")
        if layout.pipeline > 1:
            words.append(f"--pipeline-model-parallel-size {layout.pipeline}")
        if parallel.num_layers_per_virtual_pipeline_stage is not None:
            words.append(f"--num-layers-per-virtual-pipeline-stage {parallel.num_layers_per_virtual_pipeline_stage}")
        if layout.context > 1:
            words.append(f"--context-parallel-size {layout.context}")
        if layout.sharding != "no_shard":
            words.append(f"--data-parallel-sharding-strategy {layout.sharding}")
        if layout.recompute != "none":
            words.append(f"--recompute-granularity {layout.recompute}")
        return " ".join(words)


def plan_layouts(config: RunConfig, options: Options) -> dict[str, Any]:
    """Return what --plan prints, as plain values. ValueError for whatever no layout can make legal."""
    assert options.gpu is not None
    assert options.nodes is not None
    assert options.gpus_per_node is not None
    hardware = Hardware(read_device(options.gpu), options.gpus_per_node)
    world_size = options.nodes * options.gpus_per_node
    if config.training.global_batch_size is None:
        raise ValueError("--plan: needs --global-batch-size, which layouts share")
    if not config.training.bf16:
        raise ValueError("--plan: is about bf16; give --bf16")
    if config.deepspeed.deepspeed:
        raise ValueError("--plan: is about the native engine; leave out --deepspeed")
    if config.lora.lora_rank is not None:
        raise ValueError("--plan: is about training all weights; leave out --lora-rank")
    config = with_defaults(config, options)
    model = config.model if config.model.vocab_size else make_model_config(config, make_tokenizer(config.data))
    measurements = read_measurements(options.calibrate, hardware.device)
    constants = fit(measurements) if measurements else CONSTANTS
    layouts = legal_layouts(config, model, world_size, hardware)
    candidates = [predict(one, model, world_size, hardware, constants) for one in layouts]
    if not candidates:
        raise ValueError(
            f"--plan: no legal layout of {world_size} GPUs; --global-batch-size {config.training.global_batch_size} "
            "must be a multiple of the data-parallel ranks"
        )
    limit = USABLE * hardware.device.memory_gb * 1e9
    fitting = sorted((one for one in candidates if one.memory <= limit), key=lambda one: one.time.total)
    n_blocks, blend = corpus_blocks(config, options)
    plan = make_new_plan(config, n_blocks, 1, blend)
    return {
        "gpus": world_size,
        "layouts": len(candidates),
        "fitting": len(fitting),
        "memory_limit": limit,
        "best": [_describe(one, model, hardware) for one in fitting[:SHOWN]],
        "usual": _usual(candidates, fitting, limit, hardware),
        "lfr": lfr_at_scale(plan, world_size, fitting[0].time.total if fitting else None, hardware),
        "calibration": describe(measurements, constants) if measurements else None,
        "warnings": [] if fitting else ["no layout fits; give more nodes, or GPUs with more memory"],
    }


def predict(
    config: RunConfig, model: ModelConfig, world_size: int, hardware: Hardware, constants: Constants = CONSTANTS
) -> Candidate:
    """Predict a configuration's step time and memory."""
    parallel, layout = config.parallel, layout_of(config, model, world_size)
    batch, shards = micro_batch(config, model), layout.data * layout.context
    ranks = {0, layout.pipeline - 1}
    memory = max(rank_memory(batch, parallel, layout.micro_batches, shards, rank).peak for rank in ranks)
    return Candidate(config, layout, step_time(shape_for(config, model), layout, hardware, constants), memory)


def _describe(one: Candidate, model: ModelConfig, hardware: Hardware) -> dict[str, Any]:
    tokens = one.layout.tokens_per_step / one.time.total / one.layout.ranks
    flops = model.flops_per_token(one.layout.seq_length)
    return {
        "layout": one.name,
        "flags": one.flags,
        "step_seconds": one.time.total,
        "tokens_per_second_per_gpu": tokens,
        "mfu": tokens * flops / 1e12 / hardware.device.bf16_tflops,
        "memory": one.memory,
        "bubble": one.time.bubble / one.time.total,
        "communication": one.communication / one.time.total,
        "parts": vars(one.time),
    }


def _usual(
    candidates: list[Candidate], fitting: list[Candidate], limit: float, hardware: Hardware
) -> list[dict[str, Any]]:
    """Say of the layouts that one would try first why they are not among the best."""
    node = hardware.gpus_per_node
    kinds: dict[str, Callable[[Layout], bool]] = {
        "data parallel, sharded optimizer (ZeRO-1)": lambda one: one.ranks == one.data and one.sharding == "optim",
        "data parallel, all sharded (ZeRO-3)": lambda one: (
            one.ranks == one.data and one.sharding == "optim_grads_params"
        ),
        "tensor parallel over a node, no pipeline": lambda one: one.tensor == node and one.pipeline * one.context == 1,
        "tensor parallel over a node, pipeline over the others": lambda one: (
            one.tensor == node and one.pipeline * node == one.ranks and one.pipeline > 1
        ),
    }
    rows = []
    for name, belongs in kinds.items():
        same = [one for one in candidates if belongs(one.layout)]
        inside = [one for one in fitting if belongs(one.layout)]
        rows.append({"usual": name, "why": _why(same, inside, fitting, limit)})
    return rows


def _why(same: list[Candidate], inside: list[Candidate], fitting: list[Candidate], limit: float) -> str:
    if not same:
        return "not legal here"
    if not inside:
        least = min(one.memory for one in same)
        return f"needs at least {least / 1e9:.1f} GB of tensors a GPU, and {limit / 1e9:.1f} are there"
    best, first = inside[0], fitting[0]
    position = fitting.index(best) + 1
    slower = best.time.total / first.time.total
    more = {name: vars(best.time)[name] - value for name, value in vars(first.time).items()}
    worst = max(more, key=lambda name: more[name])
    if position == 1:
        return "it is the best"
    return f"number {position}, {100 * (slower - 1):.0f} % slower; most by {worst} (+{1000 * more[worst]:.0f} ms)"


def lfr_at_scale(plan: Plan, world_size: int, step: float | None, hardware: Hardware) -> dict[str, Any]:
    """Return what choosing blocks adds: the journal, the orders, and the sum of each step's losses over all ranks,
    which runs beside the next step."""
    size = 8 * plan.global_batch_size  # a loss and a count a block, in fp32
    rate = hardware.device.network_gb_per_second * 1e9
    orders = sum(ORDER_SECONDS[planned.phase.kind] * plan.n_blocks for planned in plan.phases)
    return {
        "blocks": plan.n_blocks,
        "steps": plan.total_steps,
        "journal_bytes": 4 * plan.total_samples,
        "ledger_bytes": Ledger.bytes_of(plan),
        "order_bytes": (4 if plan.n_blocks < 2**32 else 8) * max(planned.samples for planned in plan.phases),
        "order_seconds": orders,
        "order_share": None if step is None else orders / (plan.total_steps * step),
        "losses_all_reduce_seconds": 2 * size / rate + 2 * math.log2(max(2, world_size)) * LATENCY,
    }


def print_plan(result: dict[str, Any]) -> None:
    """Print the ranking."""
    if result["calibration"] is not None:
        print_calibration(result["calibration"])
    print(f"{result['gpus']} GPUs: {result['layouts']:,} legal layouts, {result['fitting']:,} fit")
    head = ["", "layout", "step ms", "tokens/s/GPU", "MFU", "GB", "bubble", "messages"]
    rows = [
        [
            str(number),
            one["layout"],
            f"{1000 * one['step_seconds']:,.0f}",
            f"{one['tokens_per_second_per_gpu']:,.0f}",
            f"{100 * one['mfu']:.1f} %",
            f"{one['memory'] / 1e9:.1f}",
            f"{100 * one['bubble']:.1f} %",
            f"{100 * one['communication']:.1f} %",
        ]
        for number, one in enumerate(result["best"], 1)
    ]
    if rows:
        print_table(head, rows, "Predicted; docs/planner.md says how far off predictions have been", left=head[:2])
    for number, one in enumerate(result["best"], 1):
        print(f"{number:3d}  {one['flags']}")
    print_table(
        ["usual layout", "why not"], [list(row.values()) for row in result["usual"]], left=["usual layout", "why not"]
    )
    lfr = result["lfr"]
    share = "" if lfr["order_share"] is None else f", {100 * lfr['order_share']:.4f} % of the run"
    print(
        f"Learn-Focus-Review over {lfr['blocks']:,} blocks and {lfr['steps']:,} steps: "
        f"journal {lfr['journal_bytes'] / 1e9:.3f} GB; "
        f"ledger {lfr['ledger_bytes'] / 1e9:.3f} GB in the memory of each node; "
        f"orders {lfr['order_seconds']:.1f} s in all (two cores of a node){share}, "
        f"the largest {lfr['order_bytes'] / 1e9:.3f} GB; "
        f"sum of a step's losses over all ranks {1000 * lfr['losses_all_reduce_seconds']:.3f} ms, beside the next step"
    )
