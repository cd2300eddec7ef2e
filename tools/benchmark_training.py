"""Measures tokens a second, and model FLOP utilisation, of training steps on one GPU (or CPU), on random tokens.

    python tools/benchmark_training.py [--model-preset 1.1B] [--seq-length 2048] [--bf16] [--compile] [--json OUT.json]

Both FLOP conventions are printed: 6 FLOP a weight and token and the causal half of attention (what the trainer logs),
and with all of the attention's square, as Megatron-LM counts. Utilisation is of --peak-tflops, which is yours to give:
989 is the data sheet's dense bf16 rate of an H100 or H200. Runs the same engine as `megatron-lfr train`, without data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import NativeEngine, build_stages, shard_stages
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.model import MODEL_PRESETS, ModelConfig
from megatron_lfr.parallel import initialize


def make_engine(config: ModelConfig, args: argparse.Namespace) -> NativeEngine:
    parallel = initialize()
    stages = build_stages(
        config,
        parallel,
        compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        recompute_granularity=args.recompute_granularity,
        compile_layers=args.compile,
    )
    return NativeEngine(
        shard_stages(stages, parallel, 1),
        OptimizerConfig(lr=1e-4),
        parallel,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
    )


def random_batch(rows: int, seq_length: int, vocab_size: int, step: int) -> Batch:
    tokens = torch.randint(0, vocab_size, (rows, seq_length + 1), generator=torch.Generator().manual_seed(step))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    mask = torch.ones(rows, seq_length)
    batch = Batch(step, np.arange(rows), slice(0, rows), inputs, labels, mask, None, None, rows * seq_length)
    return batch.pinned() if torch.cuda.is_available() else batch


def measure(engine: NativeEngine, config: ModelConfig, args: argparse.Namespace) -> list[float]:
    """Return the seconds of each step after warming up."""
    seconds = []
    for step in range(args.warmup + args.steps):
        batch = random_batch(args.global_batch_size, args.seq_length, args.vocab_size, step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        losses = engine.train_step(batch, 1e-4).wait()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if not np.isfinite(losses).all():
            raise SystemExit(f"step {step}: losses are not finite")
    return seconds[args.warmup :]


def profile_step(engine: NativeEngine, args: argparse.Namespace) -> str:
    """Return the profiler's table of a step: what took longest on the GPU, or on the CPU without one."""
    batch = random_batch(args.global_batch_size, args.seq_length, args.vocab_size, 0)
    with torch.profiler.profile() as profile:  # of all devices that are there
        engine.train_step(batch, 1e-4).wait()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table: str = profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)
    return table


def summarize(seconds: list[float], config: ModelConfig, args: argparse.Namespace) -> dict[str, object]:
    tokens = args.global_batch_size * args.seq_length
    rate = tokens / statistics.median(seconds)
    causal = config.flops_per_token(args.seq_length)
    full = config.flops_per_token(args.seq_length, causal=False)
    on_gpu = torch.cuda.is_available()
    return {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "settings": {key: value for key, value in vars(args).items() if key not in ("json", "profile")},
        "parameters": config.num_parameters(),
        "step_ms": {"median": 1000 * statistics.median(seconds), "all": [1000 * s for s in seconds]},
        "tokens_per_second": rate,
        "tflops": {"causal": rate * causal / 1e12, "full attention": rate * full / 1e12},
        "mfu": {
            "causal": rate * causal / 1e12 / args.peak_tflops,
            "full attention": rate * full / 1e12 / args.peak_tflops,
        },
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-preset", default="1.1B", choices=MODEL_PRESETS)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute-granularity", choices=["full", "selective"])
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--profile", action="store_true", help="print the profiler's table of one more step")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def model_config(args: argparse.Namespace) -> ModelConfig:
    return dataclasses.replace(MODEL_PRESETS[args.model_preset], vocab_size=args.vocab_size)


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    config = model_config(args)
    engine = make_engine(config, args)
    result = summarize(measure(engine, config, args), config, args)
    print(json.dumps({key: value for key, value in result.items() if key != "step_ms"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.profile:
        print(profile_step(engine, args))


if __name__ == "__main__":
    main()
