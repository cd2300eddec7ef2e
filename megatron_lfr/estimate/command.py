"""`megatron-lfr estimate`: what a run with these flags would take, without a GPU and without running anything."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_lfr.build import make_corpus, make_model_config, make_tokenizer
from megatron_lfr.config import RunConfig, deepspeed_settings, fill_batch, parse_run_config
from megatron_lfr.estimate import plan, versions
from megatron_lfr.estimate.deepspeed import deepspeed_memory
from megatron_lfr.estimate.memory import micro_batch, rank_memory
from megatron_lfr.estimate.options import Options, corpus_blocks, duration, take_options, with_defaults
from megatron_lfr.lfr import Plan
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.lora import adapter_parameters
from megatron_lfr.output import print_table
from megatron_lfr.planning import make_new_plan, make_run_plan
from megatron_lfr.run_folder import RunFolder

USAGE = """megatron-lfr estimate [flags of megatron-lfr train, also --config] and

  --world-size N         number of ranks; by default the fewest that the layout needs
  --blocks N             training blocks of the corpus, instead of reading them from --data-path
  --corpus-tokens N      tokens of the whole corpus, instead of --blocks; --split takes some for validation
  --tokens-per-second X  throughput of all ranks together; adds times to the estimate
  --gpu-memory GB        warn if a rank needs more memory than this, in units of 10^9 bytes
  --json                 print JSON instead of tables

`megatron-lfr estimate --plan --gpu a100|h100|h200|b200|FILE --nodes N --gpus-per-node N` with the same flags ranks all
legal layouts by their predicted step time (docs/planner.md), with memory, bubble and communication of each, and prints
the flags of the ten best. FILE: a JSON object of a device's rates. --calibrate RESULT.json,... fits the constants to
what `megatron-lfr benchmark --json` (or its --sweep) has measured on this device.

`megatron-lfr estimate versions --versions N --branch-share A` with the same flags compares ways to train N versions.

Memory is what tensors take, without the CUDA context, communication buffers and fragmentation. "host" is the host's
memory that --deepspeed offloads to.
"""


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr estimate`; returns the exit code."""
    if argv and argv[0] == "versions":
        _print(argv[1:], versions.USAGE, versions.estimate_versions, versions.print_tables)
    else:
        _print(argv, USAGE, estimate, _print_tables)
    return 0


def _print(
    argv: Sequence[str],
    usage: str,
    estimator: Callable[[RunConfig, Options], dict[str, Any]],
    print_tables: Callable[[dict[str, Any]], None],
) -> None:
    if "-h" in argv or "--help" in argv:
        print(usage)
    options, rest = take_options(argv)
    if options.plan:
        estimator, print_tables = plan.plan_layouts, plan.print_plan
    config, notes = parse_run_config(rest)
    for note in notes:
        print(note, file=sys.stderr)
    result = estimator(config, options)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_tables(result)
    for warning in result.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)


def estimate(config: RunConfig, options: Options) -> dict[str, Any]:
    """Return everything that is printed, as plain values: bytes, tokens, steps, floating-point operations, seconds.

    Raises ValueError for whatever `train` would refuse, except where an estimate does not need it.
    """
    world_size = options.world_size or config.parallel.model_parallel_size
    config = fill_batch(config, world_size)
    warnings = []
    if config.training.layer_kernels != "torch":
        warnings.append(f"--layer-kernels {config.training.layer_kernels} is estimated as torch")
    if config.training.compile:
        warnings.append("--compile is estimated as without; it keeps fewer activations")
    if config.optimizer.optimizer == "lora-rite":
        warnings.append("--optimizer lora-rite is estimated as adam; every rank holds all of its state")
    with_defaults(config, options).validate(world_size)
    model = config.model if config.model.vocab_size else make_model_config(config, make_tokenizer(config.data))
    plan = _lay_out(config, options, world_size)
    memory = memory_by_stage(config, model, world_size, plan.global_batch_size)
    largest = max(rank["peak"] for rank in memory)
    if options.gpu_memory is not None and largest > options.gpu_memory * 1e9:
        warnings.append(
            f"a rank needs {largest / 1e9:.1f} GB, more than --gpu-memory {options.gpu_memory:g}; less is needed with "
            "--recompute-granularity, a smaller --micro-batch-size, sharding, or more model-parallel ranks"
        )
    flops = {causal: config.lora.flops_per_token(model, plan.seq_length, causal=causal) for causal in (True, False)}
    phases = _phases(plan, flops, options.tokens_per_second)
    if rescored := sum(planned.phase.is_rescored for planned in plan.phases):
        # A forward pass is a third of a step: the backward computes two products for each of its own.
        forward = model.flops_per_token(plan.seq_length) / 3 * plan.n_blocks * plan.seq_length
        warnings.append(
            f"not counted: the forward pass over the corpus before each of {rescored} phases with score: rescored, "
            f"{forward:.3e} FLOP a pass"
        )
    return {
        "parameters": model.num_parameters(),
        "adapters": None if config.lora.lora_rank is None else adapter_parameters(model, config.lora),
        "vocab_size": model.vocab_size,
        "world_size": world_size,
        "data_parallel_size": config.parallel.data_parallel_size(world_size),
        "blocks": plan.n_blocks,
        "seq_length": plan.seq_length,
        "global_batch_size": plan.global_batch_size,
        "flops_per_token": {"causal": flops[True], "full attention": flops[False]},
        "memory": memory,
        "phases": phases,
        "total": _sum(phases),
        "warnings": warnings,
    }


def _lay_out(config: RunConfig, options: Options, world_size: int) -> Plan:
    """Lay out a new run, or one that was extended, which keeps its segments."""
    save = config.checkpoint.save
    if save is not None and (Path(save) / "journal" / "meta.json").exists():
        stored, _ = RunFolder(save, "--save").plan()
        if len(stored.segments) > 1:
            if options.blocks or options.corpus_tokens:
                raise ValueError(f"--blocks, --corpus-tokens: the run in {save} was extended; leave them out")
            return make_run_plan(config, make_corpus(config.data, stored), stored)
    n_blocks, blend = corpus_blocks(config, options)
    return make_new_plan(config, n_blocks, world_size, blend)


def memory_by_stage(
    config: RunConfig, model: ModelConfig, world_size: int, global_batch_size: int
) -> list[dict[str, int]]:
    """Return the memory of each pipeline rank; all ranks of a stage hold the same."""
    layout, batch = config.parallel, micro_batch(config, model)
    ranks = layout.data_parallel_size(world_size)
    micro_batches = global_batch_size // ranks // batch.rows
    if config.deepspeed.deepspeed:
        settings = deepspeed_settings(config, world_size)
        memory = deepspeed_memory(batch, layout, micro_batches, ranks * layout.context_parallel_size, settings)
        return [{"pipeline_rank": 0, **dataclasses.asdict(memory)}]
    return [
        {
            "pipeline_rank": rank,
            **dataclasses.asdict(rank_memory(batch, layout, micro_batches, ranks * layout.context_parallel_size, rank)),
        }
        for rank in range(layout.pipeline_model_parallel_size)
    ]


def _phases(plan: Plan, flops: dict[bool, float], tokens_per_second: float | None) -> list[dict[str, Any]]:
    """Return the rows of the phases. flops: of a token, by whether only the causal half of attention counts."""
    rows = []
    for planned in plan.phases:
        tokens = planned.samples * plan.seq_length
        rows.append(
            {
                "phase": f"{planned.index} {planned.phase.kind}",
                "blocks": planned.samples,
                "steps": planned.steps,
                "tokens": tokens,
                "epochs": planned.samples / plan.segments[planned.segment].n_blocks,
                "flops": tokens * flops[True],
                "flops_full_attention": tokens * flops[False],
                "seconds": None if tokens_per_second is None else tokens / tokens_per_second,
            }
        )
    return rows


def _sum(phases: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [key for key in phases[0] if key != "phase" and phases[0][key] is not None]
    return {**phases[0], "phase": "all", **{key: sum(phase[key] for phase in phases) for key in keys}}


def _print_tables(result: dict[str, Any]) -> None:
    adapters = f" and {result['adapters']:,} of adapters, which alone are trained" if result["adapters"] else ""
    print(
        f"{result['parameters']:,} parameters{adapters}, vocabulary {result['vocab_size']:,}; "
        f"{result['world_size']} ranks, {result['data_parallel_size']} of them data parallel; "
        f"{result['blocks']:,} blocks of {result['seq_length']:,} tokens, {result['global_batch_size']:,} a step"
    )
    memory = result["memory"]
    names = [name for name in memory[0] if name != "pipeline_rank" and (name != "host" or memory[0]["host"])]
    print_table(
        ["pipeline rank", *names],
        [[str(rank["pipeline_rank"]), *(f"{rank[name] / 1e9:.3f}" for name in names)] for rank in memory],
        "Memory of a rank, GB (10^9 bytes), each part where it is largest",
    )
    head = ["phase", "blocks", "steps", "tokens", "epochs", "FLOP", "FLOP, full att."]
    has_times = result["total"]["seconds"] is not None
    rows = [_phase_row(phase, has_times) for phase in (*result["phases"], result["total"])]
    print_table([*head, "time"] if has_times else head, rows, "Phases")


def _phase_row(phase: dict[str, Any], has_time: bool) -> list[str]:
    return [
        phase["phase"],
        f"{phase['blocks']:,}",
        f"{phase['steps']:,}",
        f"{phase['tokens']:,}",
        f"{phase['epochs']:.3f}",
        f"{phase['flops']:.3e}",
        f"{phase['flops_full_attention']:.3e}",
        *([duration(phase["seconds"])] if has_time else []),
    ]
