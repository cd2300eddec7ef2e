"""Four ranks that train a model of each family in several layouts, from and to checkpoints."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import read_run_config
from megatron_lfr.engine import Engine
from megatron_lfr.model import ModelConfig
from megatron_lfr.run_folder import RunFolder
from support import deepspeed_cases
from support.engine_layouts import ADAMW, LAYOUTS, RATES, TP, Layout, make_batches, make_engine, share_of
from support.engine_oracle import GlobalBatch
from support.waiting import LIMIT

STEPS = 20
"""Steps of the first layout, whose weights are saved, of one model of each family; all else takes three."""
LONG = ("llama, biases everywhere", "mistral, window", "qwen2", "qwen3", "olmo2", "gpt2")
"""One model of each family."""
_BUCKETS = {"reduce_bucket_size": 100000, "allgather_bucket_size": 100000}


def _native(layout: str, recompute: str | None = None) -> Callable[[ModelConfig], Engine]:
    return lambda model: make_engine(LAYOUTS[layout], seed=None, config=model, recompute_granularity=recompute)


def _zero(layout: Layout, stage: int) -> Callable[[ModelConfig], Engine]:
    return lambda model: deepspeed_cases.make_engine(layout, stage, ADAMW, model, seed=None, **_BUCKETS)


FIRST = {"TP2 PP2": _native("TP2 PP2")}
"""What every model is trained by."""
OTHERS = {
    "TP2 PP2 SP, selective recomputation": _native("TP2 PP2 SP", "selective"),
    "DP2 CP2 optim, full recomputation": _native("DP2 CP2 optim", "full"),
}
"""What one model of each family is trained by as well."""
ZERO = {
    "TP2 DP2, ZeRO-2": _zero(Layout(4, 4, {TP: 2}), 2),
    "DP4, ZeRO-3": _zero(Layout(4, 2, {}), 3),
}
"""What the models of OF_ZERO are trained by as well."""
OF_ZERO = {"gpt2": tuple(ZERO), "qwen3": ("DP4, ZeRO-3",), "olmo2": ("TP2 DP2, ZeRO-2",)}
"""OLMo-2's norms of queries and keys sum over tensor-parallel ranks; Qwen3's have weights that these share."""


def engines_of(name: str) -> dict[str, Callable[[ModelConfig], Engine]]:
    """Return what trains a model of `families.MODELS`."""
    return FIRST | (OTHERS if name in LONG else {}) | {kind: ZERO[kind] for kind in OF_ZERO.get(name, ())}


def steps_of(name: str) -> int:
    """Return how many steps the first layout takes with a model of `families.MODELS`."""
    return STEPS if name in LONG else len(RATES)


def steps(count: int) -> list[tuple[GlobalBatch, float]]:
    """Return so many batches and learning rates."""
    return list(itertools.islice(zip(itertools.cycle(make_batches()), itertools.cycle(RATES), strict=True), count))


def main(rank: int, folder: str, models: dict[str, str]) -> None:
    """Train each model, folder → name, of `folder`/FOLDER/run; write losses and gradient norms into
    `folder`/RANK.json, and the first engine's weights into `folder`/FOLDER/trained."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank))
    store, timeout = dist.FileStore(f"{folder}/store", 4), timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timeout)
    figures: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for model, name in models.items():
        run = RunFolder(Path(folder, model, "run"))
        figures[model] = {}
        for number, (kind, make) in enumerate(engines_of(name).items()):
            engine = make(read_run_config(run).model)
            run.checkpoint().load_into(engine.weights(), allow_extra=True)
            engine.loaded()
            figures[model][kind] = []
            for batch, lr in steps(len(RATES) if number else steps_of(name)):
                output = engine.train_step(share_of(batch, engine.parallel), lr)
                figures[model][kind].append((output.loss, output.grad_norm))
            if number == 0:
                trained = Path(folder, model, "trained", "checkpoints")
                CheckpointStore(trained, keep=None, group=engine.parallel.control_group).save(1, engine.weights(), {})
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()
