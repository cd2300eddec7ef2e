"""What two ranks measure of a layout."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lfr.estimate.activations import MicroBatch, logits_kept, stage_bytes
from megatron_lfr.estimate.memory import rank_memory
from megatron_lfr.model import ModelConfig
from megatron_lfr.model.lora import LoRAConfig
from megatron_lfr.parallel import ParallelConfig
from megatron_lfr.parallel.pipeline import make_stage
from support.measured import make_engine, sample, saved_bytes, step_peak

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=192,
    vocab_size=512,
    max_position_embeddings=256,
)


@dataclass(frozen=True)
class Case:
    """Either the activations of a forward pass, or the peak of a step beyond weights and optimizer."""

    batch: MicroBatch
    layout: ParallelConfig
    micro_batches: int = 1
    is_peak: bool = False

    def expected(self, rank: int) -> int:
        if not self.is_peak:
            return stage_bytes(self.batch, make_stage(MODEL.num_layers)) + logits_kept(self.batch)
        is_pipeline = self.layout.pipeline_model_parallel_size > 1
        ranks = 1 if is_pipeline or self.batch.tensor_ranks > 1 else 2
        memory = rank_memory(self.batch, self.layout, self.micro_batches, ranks, rank if is_pipeline else 0)
        return memory.peak - memory.weights - memory.optimizer


def _batch(itemsize: int = 4, **settings: Any) -> MicroBatch:
    return MicroBatch(MODEL, 2, 128, itemsize=itemsize, on_gpu=False, **settings)


_ADAPTERS = LoRAConfig(lora_rank=8)


CASES = {
    "tensor parallel": Case(_batch(tensor_ranks=2), ParallelConfig(tensor_model_parallel_size=2)),
    "sequence parallel": Case(
        _batch(2, tensor_ranks=2, sequence_parallel=True),
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    ),
    "tensor parallel, peak": Case(
        _batch(tensor_ranks=2), ParallelConfig(tensor_model_parallel_size=2), micro_batches=2, is_peak=True
    ),
    "sharded, peak": Case(
        _batch(), ParallelConfig(data_parallel_sharding_strategy="optim_grads_params"), micro_batches=2, is_peak=True
    ),
    "sharded optimizer, peak": Case(
        _batch(2), ParallelConfig(use_distributed_optimizer=True), micro_batches=2, is_peak=True
    ),
    "adapters, tensor parallel": Case(
        _batch(2, tensor_ranks=2, lora=_ADAPTERS), ParallelConfig(tensor_model_parallel_size=2)
    ),
    "adapters, sharded, peak": Case(
        _batch(2, lora=_ADAPTERS),
        ParallelConfig(data_parallel_sharding_strategy="optim_grads_params"),
        micro_batches=2,
        is_peak=True,
    ),
    "pipeline, peak": Case(_batch(), ParallelConfig(pipeline_model_parallel_size=2), micro_batches=4, is_peak=True),
}


def measure(rank: int, folder: str, port: int) -> None:
    """Measure on this rank, and write <rank>.json; both ranks call it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    measured = {}
    for name, case in CASES.items():
        engine = make_engine(case.batch, case.layout, case.micro_batches)
        rows = sample(case.batch, case.micro_batches * engine.parallel.data_parallel_size)
        if case.is_peak:
            per_rank = case.batch.rows * case.micro_batches
            mine = slice(engine.parallel.data_rank * per_rank, (engine.parallel.data_rank + 1) * per_rank)
            part = {name: getattr(rows, name)[mine] for name in ("tokens", "labels", "loss_mask")}
            local = type(rows)(
                rows.step,
                rows.block_ids,
                mine,
                part["tokens"],
                part["labels"],
                part["loss_mask"],
                None,
                None,
                part["labels"].numel(),
            )
            measured[name] = step_peak(engine, local)
        else:
            measured[name] = saved_bytes(engine, rows)
    Path(folder, f"{rank}.json").write_text(json.dumps(measured))
