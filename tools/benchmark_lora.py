"""Measures a step of LoRA-RITE against one of AdamW, on adapters of a 120M model, in pairs.

    python tools/benchmark_lora.py [--pairs 20] [--rows 2] [--seq-length 512] [--rank 16] [--json OUT.json]

One process on the CPU with all of its threads, fp32, random tokens. On the same batch, one engine takes a step with
each optimizer, alternating which goes first; the median ratio of the pairs is printed, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from benchmark_step import interleave, make_batch

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import NativeEngine, build_stages, shard_stages
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.model.lora import LoRAConfig, adapter_parameters, init_adapters
from megatron_lfr.model.presets import MODEL_PRESETS
from megatron_lfr.parallel import initialize

MODEL = dataclasses.replace(MODEL_PRESETS["120M"], vocab_size=32000)


class Adapted:
    """Adapters of MODEL under an optimizer."""

    def __init__(self, args: argparse.Namespace, optimizer: OptimizerConfig) -> None:
        parallel, lora = initialize(), LoRAConfig(lora_rank=args.rank)
        stages = shard_stages(build_stages(MODEL, parallel, lora=lora), parallel, 1)
        for stage in stages:
            init_adapters(stage, 1)
        self.parameters = adapter_parameters(MODEL, lora)
        sizes = {"micro_batch_size": args.rows, "global_batch_size": args.rows}
        self._engine = NativeEngine(stages, optimizer, parallel, seq_length=args.seq_length, **sizes)

    def step(self, batch: Batch) -> None:
        """Take a step to its end."""
        self._engine.train_step(batch, 1e-3).wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in (("--pairs", 20), ("--rows", 2), ("--seq-length", 512), ("--rank", 16)):
        parser.add_argument(flag, type=int, default=value)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rite = Adapted(args, OptimizerConfig(optimizer="lora-rite", clip_grad=0.0))
    adam = Adapted(args, OptimizerConfig())
    rng = np.random.default_rng(0)
    ids = np.arange(args.rows)
    batches = [make_batch(0, ids, args.rows, args.seq_length, 32000, rng) for _ in range(args.pairs + 2)]
    for batch in batches[:2]:
        rite.step(batch)
        adam.step(batch)
    result = interleave(rite.step, adam.step, batches[2:])
    print(f"{MODEL.num_parameters():,} weights, {rite.parameters:,} of adapters of rank {args.rank}")
    print(
        f"LoRA-RITE / AdamW, medians in ms: {result['median_ms']}; ratio {result['ratio']:.3f} {result['interval_95']}"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
