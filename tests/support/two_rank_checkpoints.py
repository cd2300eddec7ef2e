"""What two ranks do to write a checkpoint in shards."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.engine import build_stages, shard_stages
from megatron_lfr.engine.native import NativeEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.parallel import ParallelConfig, initialize
from support.hf_runs import BASE

LAYOUTS = {
    "tensor parallel": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "sharded": ParallelConfig(data_parallel_sharding_strategy="optim_grads_params"),
}
SEED = 9


def save(rank: int, folder: str, port: int) -> None:
    """Save the initial model in each layout under folder/<layout>/checkpoints. Called by both ranks."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, layout in LAYOUTS.items():
        parallel = initialize(layout)
        engine = NativeEngine(
            shard_stages(build_stages(BASE, parallel), parallel, SEED),
            OptimizerConfig(lr=1e-3),
            parallel,
            seq_length=16,
            micro_batch_size=1,
            global_batch_size=2,
        )
        CheckpointStore(Path(folder, name, "checkpoints"), None).save(1, engine.tensors(), {})
