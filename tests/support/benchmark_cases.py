"""Benchmarks on two ranks: each case is a layout, and rank 0 writes the results of all."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_lfr.benchmark.measure import measure
from megatron_lfr.benchmark.options import Options
from megatron_lfr.config import parse_run_config
from megatron_lfr.model import Decoder

HIDDEN, LAYERS, LENGTH, ROWS, BATCH, VOCAB = 32, 4, 16, 2, 8, 64
FLAGS = [
    *("--num-layers", str(LAYERS), "--hidden-size", str(HIDDEN), "--num-attention-heads", "4"),
    *("--vocab-size", str(VOCAB), "--make-vocab-size-divisible-by", "2", "--ffn-hidden-size", "64"),
    *("--seq-length", str(LENGTH), "--micro-batch-size", str(ROWS), "--global-batch-size", str(BATCH)),
]
OPTIONS = Options(steps=3, warmup=1, traced_steps=2)
SLOW = "DP2, rank 1 slow"
SECONDS = 0.5
"""By which each forward pass of the slow rank is longer."""
COMPILED = "TP2, compiled"
CASES: dict[str, list[str]] = {
    "TP2": ["--tensor-model-parallel-size", "2"],
    COMPILED: ["--tensor-model-parallel-size", "2", "--compile"],
    "PP2": ["--pipeline-model-parallel-size", "2", "--untie-embeddings-and-output-weights"],
    "CP2": ["--context-parallel-size", "2"],
    "DP2 optim": ["--use-distributed-optimizer"],
    SLOW: ["--lfr-schedule", "[{kind: learn, duration: 8, unit: steps}, "
           "{kind: focus, duration: 4, unit: steps, score: rescored}]"],
}  # fmt: skip


DEEPSPEED = "DP2 ZeRO-2"
if find_spec("deepspeed") is not None:
    CASES[DEEPSPEED] = ["--deepspeed", "--deepspeed-config"]  # main adds the file


def main(rank: int, port: int, folder: str) -> None:
    """Run all cases as one rank of two."""
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    config = Path(folder, f"deepspeed_{rank}.json")
    config.write_text('{"zero_optimization": {"stage": 2}}')
    results = {}
    for name, flags in CASES.items():
        file = [str(config)] if name == DEEPSPEED else []
        results[name] = run([*FLAGS, *flags, *file], rank == 1 and name == SLOW)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))


def run(flags: list[str], is_slow: bool = False) -> dict[str, Any]:
    """Benchmark as this rank, whose forward passes in training take longer where it `is_slow`."""
    forward = Decoder.forward

    def slow_forward(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SECONDS if torch.is_grad_enabled() else 0.0)
        return forward(*args, **kwargs)

    traced = partial(torch.compile, backend="eager")  # the compiler's front end alone: its C++ takes half a minute
    with (
        mock.patch.object(Decoder, "forward", slow_forward if is_slow else forward),
        mock.patch.object(torch, "compile", traced),
    ):
        return measure(parse_run_config(flags)[0], OPTIONS)
