"""Four ranks that train a model of each family in several layouts, from and to checkpoints."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import read_run_config
from megatron_lfr.run_folder import RunFolder
from support.engine_cases import LAYOUTS, RATES, make_batches, make_engine, share_of
from support.waiting import LIMIT

NAMES = ("TP2 PP2", "TP2 PP2 SP", "DP2 CP2 optim")
"""Layouts; the first one's weights are saved."""


def main(rank: int, folder: str, models: list[str]) -> None:
    """Train each model of `folder`/MODEL/run; write losses and gradient norms into `folder`/RANK.json, and the first
    layout's weights into `folder`/MODEL/trained."""
    torch.set_num_threads(1)
    store, timeout = dist.FileStore(f"{folder}/store", 4), timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timeout)
    figures: dict[str, dict[str, list[tuple[float, float]]]] = {layout: {} for layout in NAMES}
    for layout in NAMES:
        for model in models:
            run = RunFolder(Path(folder, model, "run"))
            engine = make_engine(LAYOUTS[layout], seed=None, config=read_run_config(run).model)
            run.checkpoint().load_into(engine.weights(), allow_extra=True)
            steps = []
            for batch, lr in zip(make_batches(), RATES, strict=True):
                output = engine.train_step(share_of(batch, engine.parallel), lr)
                steps.append((output.loss, output.grad_norm))
            figures[layout][model] = steps
            if layout == NAMES[0]:
                trained = Path(folder, model, "trained", "checkpoints")
                CheckpointStore(trained, keep=None, group=engine.parallel.control_group).save(1, engine.weights(), {})
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()
