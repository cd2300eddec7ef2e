"""The layouts that `train` takes on a cluster, and what its devices can do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_lfr.config import RunConfig
from megatron_lfr.estimate.step_time import Hardware, Layout, Shape, shape_of
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.output import is_number
from megatron_lfr.parallel.config import ParallelConfig
from megatron_lfr.parallel.devices import DEVICES, Device


def read_device(name: str) -> Device:
    """Return a device of the table by its name, or what a JSON file says of one. ValueError names --gpu."""
    if name in DEVICES:
        return DEVICES[name]
    path, fields = Path(name), [field.name for field in dataclasses.fields(Device)]
    if not path.is_file():
        raise ValueError(f"--gpu {name}: choose from {', '.join(DEVICES)}, or name a JSON file")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"--gpu {name}: not a JSON file") from None
    needed = [field for field in fields if field != "fp32_tflops"]
    good = isinstance(values, dict) and all(is_number(values.get(field)) and values[field] > 0 for field in needed)
    if not good or set(values) - set(fields):
        raise ValueError(f"--gpu {name}: must be an object of positive numbers: {', '.join(needed)}")
    return Device(**{"fp32_tflops": None, **values})


def shape_for(config: RunConfig, model: ModelConfig) -> Shape:
    """Return the sizes of a model as a run computes it: with dropout in attention, scores go to memory."""
    return dataclasses.replace(shape_of(model), materializes_scores=config.dropout.attention_dropout > 0)


def layout_of(config: RunConfig, model: ModelConfig, world_size: int) -> Layout:
    """Return what the model of step times needs to know of a configuration with a global batch size."""
    parallel, training = config.parallel, config.training
    data, pipeline = parallel.data_parallel_size(world_size), parallel.pipeline_model_parallel_size
    return Layout(
        seq_length=config.data.seq_length,
        micro_batch=training.micro_batch_size,
        micro_batches=(training.global_batch_size or 0) // data // training.micro_batch_size,
        data=data,
        tensor=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline=pipeline,
        stages_per_rank=parallel.num_stages(model.num_layers) // pipeline,
        context=parallel.context_parallel_size,
        sharding=parallel.sharding,
        recompute=training.recompute_granularity or "none",
        is_compiled=training.compile,
    )


def legal_layouts(config: RunConfig, model: ModelConfig, world_size: int, hardware: Hardware) -> Iterator[RunConfig]:
    """Yield the configurations of all legal layouts: every split of the ranks, with tensor parallelism inside of nodes;
    micro-batches of powers of two up to 16; virtual stages of 1, 2, 4 or 8 layers."""
    for tensor in _divisors(min(world_size, hardware.gpus_per_node)):
        for pipeline in _divisors(world_size // tensor if world_size % tensor == 0 else 1):
            for context in _divisors(world_size // tensor // pipeline):
                if context > 1 and config.data.seq_length % (2 * context):
                    continue
                yield from _with_options(config, model, world_size, tensor, pipeline, context)


def _with_options(
    config: RunConfig, model: ModelConfig, world_size: int, tensor: int, pipeline: int, context: int
) -> Iterator[RunConfig]:
    blocks = config.training.global_batch_size or 0
    data = world_size // tensor // pipeline // context
    if world_size % (tensor * pipeline * context) or blocks % data:
        return
    rows = [size for size in (1, 2, 4, 8, 16) if blocks // data % size == 0]
    stages: list[int | None] = [None]
    if pipeline > 1:
        stages += [
            n for n in (1, 2, 4, 8) if model.num_layers % (pipeline * n) == 0 and model.num_layers // pipeline > n
        ]
    shardings = ["no_shard", "optim"] if pipeline > 1 else ["no_shard", "optim", "optim_grads", "optim_grads_params"]
    for layers in stages:
        for sharding in shardings if data * context > 1 else ["no_shard"]:
            parallel = ParallelConfig(
                tensor_model_parallel_size=tensor,
                sequence_parallel=tensor > 1,
                pipeline_model_parallel_size=pipeline,
                num_layers_per_virtual_pipeline_stage=layers,
                context_parallel_size=context,
                data_parallel_sharding_strategy=sharding,  # type: ignore[arg-type]
            )
            for size in rows:
                if _is_legal(parallel, model, world_size, config.data.seq_length, size, blocks // data // size):
                    for recompute in (None, "selective", "full"):
                        training = dataclasses.replace(
                            config.training,
                            micro_batch_size=size,
                            recompute_granularity=recompute,
                        )
                        yield dataclasses.replace(config, parallel=parallel, training=training)


def _is_legal(
    parallel: ParallelConfig, model: ModelConfig, world_size: int, seq_length: int, rows: int, micro_batches: int
) -> bool:
    """Return whether `train` takes a layout, by its own checks."""
    try:
        parallel.validate(world_size)
        model.validate(parallel.tensor_model_parallel_size)
        parallel.check_batches(model.num_layers, seq_length, rows, micro_batches)
    except ValueError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
