"""What torch measures of an engine's step on this CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import build_stages, shard_stages
from megatron_lfr.engine.native import NativeEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.estimate.activations import MicroBatch
from megatron_lfr.parallel import ParallelConfig, initialize


def make_engine(batch: MicroBatch, layout: ParallelConfig, micro_batches: int) -> NativeEngine:
    """For a step of so many micro-batches on each data-parallel rank."""
    parallel = initialize(layout)
    stages = build_stages(
        batch.model,
        parallel,
        compute_dtype=torch.bfloat16 if batch.itemsize == 2 else torch.float32,
        recompute_granularity=batch.recompute,
        dropout=batch.dropout,
        lora=batch.lora,
    )
    return NativeEngine(
        shard_stages(stages, parallel, 1),
        OptimizerConfig(lr=1e-3),
        parallel,
        seq_length=batch.seq_length,
        micro_batch_size=batch.rows,
        global_batch_size=batch.rows * micro_batches * parallel.data_parallel_size,
    )


def sample(batch: MicroBatch, micro_batches: int) -> Batch:
    rows, vocabulary = batch.rows * micro_batches, batch.model.vocab_size
    assert vocabulary is not None
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (rows, batch.seq_length + 1), generator=generator)
    documents = torch.arange(batch.seq_length).expand(rows, -1) // 50 if batch.has_mask else None
    positions = torch.arange(batch.seq_length).expand(rows, -1) % 50 if batch.has_positions else None
    return Batch(
        0,
        np.arange(rows),
        slice(0, rows),
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.ones(rows, batch.seq_length),
        positions,
        documents,
        rows * batch.seq_length,
    )


def saved_bytes(engine: NativeEngine, inputs: Batch) -> int:
    """Memory that autograd keeps after a forward pass: each storage once, weights left out."""
    model = engine.stages[0]
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, *_ = model(
            inputs.tokens,
            inputs.labels,
            inputs.loss_mask,
            position_ids=inputs.position_ids,
            document_ids=inputs.document_ids,
            sample_keys=model.draw_sample_keys(0, inputs.rows, inputs.tokens.device),
        )
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    total = sum(storage.nbytes() for address, storage in storages.items() if address not in weights)
    loss.backward()
    return total


def step_peak(engine: NativeEngine, inputs: Batch) -> int:
    """Return the most memory that is allocated at a time in a step, beyond what is there before and after."""
    engine.train_step(inputs, 1e-3).wait()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine.train_step(inputs, 1e-3).wait()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())
