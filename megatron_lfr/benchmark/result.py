"""The result of a benchmark, as JSON: docs/benchmark.md documents its keys."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from megatron_lfr.benchmark.inputs import NO_CORPUS, Inputs
from megatron_lfr.benchmark.options import Options
from megatron_lfr.benchmark.parts import PARTS, PIPELINE, STEP
from megatron_lfr.benchmark.statistics import summarize
from megatron_lfr.config import RunConfig
from megatron_lfr.estimate.command import memory_by_stage
from megatron_lfr.estimate.results import FORMAT
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.devices import device_key, device_name, peak_tflops
from megatron_lfr.parallel.spans import MICRO_BATCHES

CONVENTIONS = {
    "causal": "6 x weights of matrix products + 12 x layers x heads x head size x (sequence + 1) / 2",
    "full attention": "6 x weights of matrix products + 12 x layers x heads x head size x sequence (Megatron-LM)",
}
"""Floating-point operations of a token in training; recomputation does not count."""
_WITH_ADAPTERS = ("6 x weights of matrix products", "4 x weights of matrix products + 6 x weights of adapters")
"""A part of them, and what it is where adapters are trained."""


@dataclass
class Measured:
    """What the ranks have measured."""

    by_rank: list[dict[str, Any]]
    seconds: float
    """Of all timed steps together, on the slowest rank."""
    collectives: list[dict[str, Any]]
    lfr: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> dict[str, Any]:
        """The seconds of a step, each of the slowest rank."""
        return summarize(np.max([one["step_seconds"] for one in self.by_rank], 0).tolist())

    @property
    def recording(self) -> float:
        """The seconds of recording the losses of a step, on the slowest rank."""
        return max(float(one["record_seconds"]) for one in self.by_rank)


def make_result(
    config: RunConfig, options: Options, inputs: Inputs, parallel: ParallelState, measured: Measured
) -> dict[str, Any]:
    """Put the result together."""
    world_size, model, plan = len(measured.by_rank), inputs.model, inputs.plan
    tokens = plan.phases[0].global_batch_size * plan.seq_length
    rate = tokens * options.steps / measured.seconds
    peak, is_given = config.logging.peak_tflops, config.logging.peak_tflops is not None
    peak = peak if is_given else peak_tflops(parallel.device, config.training.bf16)
    flops = {}
    for name, formula in CONVENTIONS.items():
        if config.lora.lora_rank is not None:
            formula = formula.replace(*_WITH_ADAPTERS)
        per_token = config.lora.flops_per_token(model, plan.seq_length, causal=name == "causal")
        tflops = rate * per_token / world_size / 1e12
        mfu = None if peak is None else tflops / peak
        flops[name] = {
            "formula": formula, "flops_per_token": per_token, "tflops_per_rank": tflops, "mfu": mfu
        }  # fmt: skip
    defaults = RunConfig().to_flat()
    return {
        "format": FORMAT,
        "date": str(date.today()),
        "version": version("megatron-lfr"),
        "torch": torch.__version__,
        "device": device_name(parallel.device) if parallel.device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "ranks": world_size,
        "data": NO_CORPUS if config.data.data_path == [NO_CORPUS] else "corpus",
        "settings": {k: v for k, v in config.to_flat().items() if v != defaults[k] and k not in ("save", "data_path")},
        "parameters": model.num_parameters(),
        "warmup_steps": options.warmup,
        "step_seconds": measured.step,
        "tokens_per_step": tokens,
        "tokens_per_second": rate,
        "tokens_per_second_per_rank": rate / world_size,
        "peak_tflops": peak,
        "peak_from": _peak_source(peak, is_given, parallel, config.training.bf16),
        "flops": flops,
        "traced_step_seconds": max(one["traced_step_seconds"] for one in measured.by_rank),
        "parts": _parts(measured.by_rank),
        "pipeline": _pipeline(config, parallel, measured.by_rank, model.num_layers, plan.phases[0].global_batch_size),
        "collectives": measured.collectives,
        "lfr": measured.lfr,
        "memory": {
            "of": "tensors on the GPU" if parallel.device.type == "cuda" else "the process",
            "peak_bytes": max(one["peak_memory_bytes"] for one in measured.by_rank),
            "estimated_bytes": max(
                one["peak"] for one in memory_by_stage(config, model, world_size, plan.global_batch_size)
            ),
        },
        "by_rank": [
            {key: value for key, value in one.items() if key != "step_seconds"} for one in measured.by_rank
        ],
    }  # fmt: skip


def _parts(by_rank: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the seconds of each part of a traced step: the mean over the ranks, and the extremes."""
    parts = {"waiting for data": [one["wait_seconds"] for one in by_rank]}
    parts |= {name: [one["parts"][name] for one in by_rank] for name in (*PARTS, STEP)}
    return {name: {"mean": float(np.mean(v)), "min": min(v), "max": max(v)} for name, v in parts.items()}


def _pipeline(
    config: RunConfig, parallel: ParallelState, by_rank: list[dict[str, Any]], num_layers: int, blocks: int
) -> dict[str, Any] | None:
    """Return the share of the time of all micro-batches in which a rank waits for others, and the least one that the
    schedule allows for equal stages: (p - 1) / (v m + p - 1) of p ranks with v stages each and m micro-batches
    (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 2.2)."""
    layout = config.parallel
    size = layout.pipeline_model_parallel_size
    if size == 1:
        return None
    stages = layout.num_stages(num_layers) // size
    micro_batches = blocks // parallel.data_parallel_size // config.training.micro_batch_size
    waiting = [one["parts"][PIPELINE] / one["parts"][MICRO_BATCHES] for one in by_rank]
    rounds = stages if layout.schedule == "interleaved" else 1
    return {
        "stages_per_rank": stages,
        "micro_batches": micro_batches,
        "bubble_measured": float(np.mean(waiting)),
        "bubble_ideal": (size - 1) / (rounds * micro_batches + size - 1),
    }


def _peak_source(peak: float | None, is_given: bool, parallel: ParallelState, is_bf16: bool) -> str | None:
    if peak is None:
        return None
    key = device_key(device_name(parallel.device))
    return "--peak-tflops" if is_given else f"data sheet of {key}, dense {'bf16' if is_bf16 else 'fp32'}"


def _processor() -> str:
    return platform.processor() or platform.machine()
