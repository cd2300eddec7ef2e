"""Measures step times of parallel layouts on a CPU, against Megatron-core on the same ranks.

    python tools/benchmark_megatron_core.py [--steps 30] [--only "TP2;DP2"] [--json OUT.json]

One thread a process, fp32, gloo. In turn, all ranks take a step with our engine and one with Megatron-core's GPT of the
same sizes (tools/megatron_core_on_cpu.py), alternating which goes first, on the same batch; the ratio of each pair is
taken, and the median ratio with a 95 % bootstrap interval printed. Needs megatron-core and a machine that does nothing
else.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmark_layouts import GLOBAL_BATCH, MODEL, SEQ_LENGTH, begin, join, rows_of
from benchmark_step import interleave, make_batch
from megatron_core_on_cpu import MegatronCore, replace_cuda

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import NativeEngine, build_stages, shard_stages
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.parallel import ParallelConfig, initialize

LAYOUTS: dict[str, tuple[int, int, ParallelConfig]] = {
    "one process": (1, 8, ParallelConfig()),
    "TP2": (2, 8, ParallelConfig(tensor_model_parallel_size=2)),
    "PP2": (2, 2, ParallelConfig(pipeline_model_parallel_size=2)),
    "DP2": (2, 4, ParallelConfig()),
    "TP2 PP2": (4, 2, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}
"""Name → (ranks, rows of a micro-batch, layout)."""


def measure(rank: int, world_size: int, name: str, steps: int, folder: str) -> None:
    """Run one rank of one layout; rank 0 writes its times to `folder`/result.json."""
    join(rank, world_size, folder)
    _, rows, layout = LAYOUTS[name]
    parallel = initialize(layout)
    ours = NativeEngine(
        shard_stages(build_stages(MODEL, parallel), parallel, 1),
        OptimizerConfig(lr=1e-4),
        parallel,
        seq_length=SEQ_LENGTH,
        micro_batch_size=rows,
        global_batch_size=GLOBAL_BATCH,
    )
    replace_cuda()
    theirs = MegatronCore(MODEL, layout, SEQ_LENGTH, rows)
    rng = np.random.default_rng(0)
    share = GLOBAL_BATCH // parallel.data_parallel_size
    mine = slice(parallel.data_rank * share, (parallel.data_rank + 1) * share)
    ids = np.arange(GLOBAL_BATCH)
    vocabulary = MODEL.padded_vocab_size
    batches = [make_batch(0, ids, GLOBAL_BATCH, SEQ_LENGTH, vocabulary, rng) for _ in range(steps + 5)]
    losses: list[tuple[float, float | None]] = []

    def our_step(batch: Batch) -> None:
        dist.barrier()
        launched = ours.train_step(rows_of(batch, mine), 1e-4)
        launched.wait()
        losses.append((launched.loss, None))

    def their_step(batch: Batch) -> None:
        dist.barrier()
        losses.append((losses[-1][0] if losses else 0.0, theirs.train_step(rows_of(batch, mine))))

    for batch in batches[:5]:
        our_step(batch)
        their_step(batch)
    result = {"last_losses": losses[-1], **interleave(our_step, their_step, batches[5:])}
    every: list[dict[str, object]] = [{}] * world_size
    dist.all_gather_object(every, result)
    if rank == 0:
        result["last_losses"] = every[-1]["last_losses"]
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    args = begin(__doc__, LAYOUTS)
    print(f"{'layout':12s} ranks  ours (ms)  Megatron-core (ms)  ratio")
    results = {}
    for name in args.only:
        ranks = LAYOUTS[name][0]
        with tempfile.TemporaryDirectory() as folder:
            arguments = (ranks, name, args.steps, folder)
            mp.start_processes(measure, arguments, nprocs=ranks, start_method="forkserver")
            results[name] = result = json.loads(Path(folder, "result.json").read_text())
        (ours, theirs), (low, high) = result["median_ms"], result["interval_95"]
        print(
            f"{name:12s} {ranks:5d}  {ours:9.1f}  {theirs:18.1f}  {result['ratio']:.3f} [{low:.3f}, {high:.3f}], "
            f"losses {result['last_losses']}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
