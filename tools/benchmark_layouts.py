"""Measures step times of parallel layouts on a CPU, against transformers' LlamaForCausalLM in one process.

    python tools/benchmark_layouts.py [--steps 30] [--only "TP2;DP2"] [--json OUT.json]

One thread a process, fp32, gloo. In turn, all ranks take a step of the layout, then rank 0 takes one of the peer while
the others wait; the ratio of each such pair is taken, and the median ratio with a 95 % bootstrap interval printed.
Layouts of more ranks than cores share them: their ratio says what the layout costs, not what it gains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmark_step import Transformers, interleave, make_batch

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import NativeEngine, build_stages, shard_stages
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.model import ModelConfig
from megatron_lfr.parallel import ParallelConfig, initialize

MODEL = ModelConfig(
    num_layers=6,
    hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=640,
    vocab_size=2048,
    max_position_embeddings=256,
)
SEQ_LENGTH, GLOBAL_BATCH = 256, 8
LAYOUTS: dict[str, tuple[int, int, ParallelConfig]] = {
    "one process": (1, 8, ParallelConfig()),
    "TP2": (2, 8, ParallelConfig(tensor_model_parallel_size=2)),
    "TP2 SP": (2, 8, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2 1f1b": (2, 2, ParallelConfig(pipeline_model_parallel_size=2)),
    "PP2 gpipe": (2, 2, ParallelConfig(pipeline_model_parallel_size=2, pipeline_schedule="gpipe")),
    "PP2 interleaved": (
        2,
        2,
        ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
    ),
    "CP2": (2, 8, ParallelConfig(context_parallel_size=2)),
    "DP2": (2, 4, ParallelConfig()),
    "DP2 optim": (2, 4, ParallelConfig(data_parallel_sharding_strategy="optim")),
    "DP2 optim_grads": (2, 4, ParallelConfig(data_parallel_sharding_strategy="optim_grads")),
    "DP2 optim_grads_params": (2, 4, ParallelConfig(data_parallel_sharding_strategy="optim_grads_params")),
    "TP2 PP2": (4, 2, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "TP2 DP2": (4, 4, ParallelConfig(tensor_model_parallel_size=2)),
}
"""Name → (ranks, rows of a micro-batch, layout)."""


def measure(rank: int, world_size: int, name: str, steps: int, folder: str) -> None:
    """Run one rank of one layout; rank 0 writes its times to `folder`/result.json."""
    join(rank, world_size, folder)
    _, rows, layout = LAYOUTS[name]
    parallel = initialize(layout)
    engine = NativeEngine(
        shard_stages(build_stages(MODEL, parallel), parallel, 1),
        OptimizerConfig(lr=1e-4),
        parallel,
        seq_length=SEQ_LENGTH,
        micro_batch_size=rows,
        global_batch_size=GLOBAL_BATCH,
    )
    rng = np.random.default_rng(0)
    share = GLOBAL_BATCH // parallel.data_parallel_size
    mine = slice(parallel.data_rank * share, (parallel.data_rank + 1) * share)
    ids = np.arange(GLOBAL_BATCH)
    batches = [make_batch(0, ids, GLOBAL_BATCH, SEQ_LENGTH, 2048, rng) for _ in range(steps + 5)]

    def step(batch: Batch) -> None:
        dist.barrier()  # the others come from waiting, rank 0 from the peer's step
        engine.train_step(rows_of(batch, mine), 1e-4).wait()

    def peer_step(batch: Batch) -> None:
        peer.train_step(batch, 1e-4)

    if rank > 0:
        for batch in batches:
            step(batch)
    else:
        peer = Transformers(MODEL, 2048)
        for batch in batches[:5]:
            step(batch)
            peer_step(batch)
        result = interleave(step, peer_step, batches[5:])
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Return a rank's share of a global batch."""
    tokens, labels, mask = batch.tokens[rows], batch.labels[rows], batch.loss_mask[rows]
    return dataclasses.replace(
        batch, rows=rows, tokens=tokens, labels=labels, loss_mask=mask, valid_tokens=tokens.numel()
    )


def join(rank: int, ranks: int, folder: str) -> None:
    """Make this process one of some ranks that meet in a folder: one thread, gloo."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def begin(description: str | None, cases: Iterable[str]) -> argparse.Namespace:
    """Parse --steps, --only (some of the cases) and --json, and print what is measured on which machine."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", help="names of what to measure, separated by semicolons (default: all)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.only = args.only.split(";") if args.only else list(cases)
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread a process, "
        f"torch {torch.__version__}, {MODEL.num_parameters():,} parameters, {GLOBAL_BATCH} x {SEQ_LENGTH} tokens a "
        f"step, {args.steps} pairs of steps"
    )
    return args


def main() -> None:
    args = begin(__doc__, LAYOUTS)
    print(f"{'layout':24s} ranks  ours (ms)  transformers (ms)  ratio")
    results = {}
    for name in args.only:
        ranks = LAYOUTS[name][0]
        with tempfile.TemporaryDirectory() as folder:
            arguments = (ranks, name, args.steps, folder)
            mp.start_processes(measure, arguments, nprocs=ranks, start_method="forkserver")
            results[name] = result = json.loads(Path(folder, "result.json").read_text())
        (ours, peer), (low, high) = result["median_ms"], result["interval_95"]
        print(
            f"{name:24s} {ranks:5d}  {ours:9.1f}  {peer:17.1f}  {result['ratio']:.3f} [{low:.3f}, {high:.3f}]",
            flush=True,
        )
        time.sleep(1)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
