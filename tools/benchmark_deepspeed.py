"""Step times of DeepSpeed's ZeRO-0 to 3 against the native engine's strategies, on two ranks of a CPU.

    python tools/benchmark_deepspeed.py [--steps 30] [--only "ZeRO-1;ZeRO-3"] [--json OUT.json]

One thread a process, gloo. Both engines take a step on the same batch, in turn first; the ratio of each pair is taken,
and the median ratio with a 95 % bootstrap interval printed. Buckets are as large as the model, and at stage 3 all of it
is sharded, in both engines. The last rows are of bf16 and of offloading, which on a CPU copies from the host to itself.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmark_layouts import GLOBAL_BATCH, MODEL, SEQ_LENGTH, begin, join, rows_of
from benchmark_step import interleave, make_batch

from megatron_lfr.config import RunConfig
from megatron_lfr.config.deepspeed_given import fill
from megatron_lfr.config.deepspeed_stated import STRATEGIES
from megatron_lfr.config.training import TrainingConfig
from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import Engine, NativeEngine, build_stages, shard_stages
from megatron_lfr.engine.deepspeed import DeepSpeedEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.parallel import ParallelConfig, initialize

RANKS, ROWS = 2, 2
"""Ranks, and rows of a micro-batch, of which each rank takes two a step."""


@dataclass(frozen=True)
class Case:
    """A stage of ZeRO, what is added to its section, and the dtype of the layers."""

    stage: int
    zero: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


CPU = {"device": "cpu"}
CASES = {
    **{f"ZeRO-{stage}": Case(stage) for stage in range(4)},
    **{f"ZeRO-{stage}, bf16": Case(stage, dtype=torch.bfloat16) for stage in range(4)},
    "ZeRO-2, optimizer offloaded": Case(2, {"offload_optimizer": CPU}),
    "ZeRO-3, all offloaded": Case(3, {"offload_optimizer": CPU, "offload_param": CPU}),
}


def make_engines(case: Case) -> tuple[DeepSpeedEngine, NativeEngine]:
    """Both engines with the same sharding."""
    layout = ParallelConfig(data_parallel_sharding_strategy=STRATEGIES[case.stage])  # type: ignore[arg-type]
    parallel = initialize(layout)
    sizes = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), MODEL.num_parameters())
    if case.stage == 3:
        sizes["stage3_param_persistence_threshold"] = 0
    adamw = OptimizerConfig(lr=1e-4)
    training = TrainingConfig(micro_batch_size=ROWS, bf16=case.dtype == torch.bfloat16)
    config = RunConfig(model=MODEL, optimizer=adamw, training=training, parallel=layout)
    settings = fill({"zero_optimization": {**sizes, **case.zero}}, config)
    (model,) = build_stages(MODEL, parallel, compute_dtype=case.dtype)
    native = NativeEngine(
        shard_stages(build_stages(MODEL, parallel, compute_dtype=case.dtype), parallel, 1),
        adamw,
        parallel,
        seq_length=SEQ_LENGTH,
        micro_batch_size=ROWS,
        global_batch_size=GLOBAL_BATCH,
    )
    return DeepSpeedEngine(model, adamw, parallel, settings, micro_batch_size=ROWS, seed=1), native


def measure(rank: int, names: list[str], steps: int, folder: str) -> None:
    """One rank, all cases; rank 0 writes what it measured to `folder`/result.json."""
    join(rank, RANKS, folder)
    share, ids = GLOBAL_BATCH // RANKS, np.arange(GLOBAL_BATCH)
    rng = np.random.default_rng(0)
    results = {}
    for name in names:
        engines = make_engines(CASES[name])
        batches = [make_batch(0, ids, GLOBAL_BATCH, SEQ_LENGTH, 2048, rng) for _ in range(steps + 3)]

        def step(engine: Engine, batch: Batch) -> None:
            dist.barrier()
            engine.train_step(rows_of(batch, slice(rank * share, (rank + 1) * share)), 1e-4).wait()

        def first(batch: Batch, engine: Engine = engines[0]) -> None:
            step(engine, batch)

        def second(batch: Batch, engine: Engine = engines[1]) -> None:
            step(engine, batch)

        for batch in batches[:3]:  # warm up
            first(batch)
            second(batch)
        results[name] = interleave(first, second, batches[3:])
        if rank == 0:
            _print_row(name, results[name])
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _print_row(name: str, result: dict[str, Any]) -> None:
    (deepspeed, native), (low, high) = result["median_ms"], result["interval_95"]
    print(f"{name:28s} {deepspeed:9.1f}  {native:9.1f}  {result['ratio']:.3f} [{low:.3f}, {high:.3f}]", flush=True)


def main() -> None:
    args = begin(__doc__, CASES)
    print(f"{'stage, on ' + str(RANKS) + ' ranks':28s} DeepSpeed  native    ratio (of times in ms)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(measure, (args.only, args.steps, folder), nprocs=RANKS, start_method="forkserver")
        if args.json:
            args.json.write_text(Path(folder, "result.json").read_text() + "\n")


if __name__ == "__main__":
    main()
