"""What the ranks of DeepSpeed's tests run, against the native engine's oracle."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import parity_matrix as matrix
import torch
import torch.distributed as dist

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import RunConfig
from megatron_lfr.config.deepspeed_given import fill
from megatron_lfr.config.deepspeed_stated import STRATEGIES
from megatron_lfr.config.training import TrainingConfig
from megatron_lfr.engine import Engine, NativeEngine, build_stages, shard_stages
from megatron_lfr.engine.deepspeed import DeepSpeedEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.model import ModelConfig
from megatron_lfr.model.dropout import DropoutConfig
from megatron_lfr.model.lora import LoRAConfig
from megatron_lfr.parallel import ParallelConfig, initialize
from megatron_lfr.parallel.flat_shard import FlatShard
from support import deepspeed_memory
from support.engine_errors import Errors, changed, eval_error, merge, step_errors
from support.engine_layouts import (
    ADAMW,
    ADAPTERS,
    CP,
    DROPOUT,
    RATES,
    ROWS,
    SEED,
    SHARDING,
    TOY,
    TP,
    TP2_SP,
    Layout,
    make_batches,
    parallel_state,
    share_of,
)
from support.engine_oracle import Expected, GlobalBatch, Oracle
from support.lora_oracle import LoRAOracle, random_b
from support.waiting import LIMIT

MODEL = dataclasses.replace(TOY, num_layers=2)


def settings(stage: int, adamw: OptimizerConfig, bf16: bool = False, **zero: Any) -> dict[str, Any]:
    """Return what DeepSpeed is given; small buckets, and nothing kept whole at stage 3."""
    sizes = {"reduce_bucket_size": 500, "allgather_bucket_size": 500} if stage else {}
    if stage == 3:
        sizes = {"reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
    config = RunConfig(
        optimizer=adamw,
        training=TrainingConfig(bf16=bf16),
        parallel=ParallelConfig(data_parallel_sharding_strategy=STRATEGIES[stage]),  # type: ignore[arg-type]
    )
    return fill({"zero_optimization": {**sizes, **zero}}, config)


def make_engine(
    layout: Layout,
    stage: int,
    adamw: OptimizerConfig,
    config: ModelConfig = MODEL,
    seed: int | None = SEED,
    dropout: DropoutConfig | None = None,
    lora: LoRAConfig | None = None,
    **zero: Any,
) -> DeepSpeedEngine:
    parallel = parallel_state(dataclasses.replace(layout.config, **{SHARDING: STRATEGIES[stage]}))
    (model,) = build_stages(config, parallel, dropout=dropout, dropout_seed=SEED, lora=lora)
    given = settings(stage, adamw, **zero)
    return DeepSpeedEngine(model, adamw, parallel, given, micro_batch_size=layout.micro_batch, seed=seed)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, fp64, from all ranks; each element must come from somewhere, and be equal everywhere."""
    assert isinstance(tensor, FlatShard)
    sums, counts = torch.zeros(2, *tensor.shape, dtype=torch.float64)
    for at, piece in tensor.pieces.items():
        where = tuple(slice(first, first + size) for first, size in zip(at, piece.shape, strict=True))
        sums[where] += piece
        counts[where] += 1
    for part in (sums, counts):
        dist.all_reduce(part)
    return sums / counts


def weight_error(engine: DeepSpeedEngine, oracle: Expected) -> float:
    errors = []
    for name, weight in engine.weights().items():
        expected = oracle.weights[name.removeprefix("model.")].detach()
        errors.append(float((gathered(weight) - expected).norm() / expected.norm()))
    return max(errors)


def snapshot(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return the bits of this rank's part of all that training continues from."""
    local = {n: t.flat if isinstance(t, FlatShard) else t for n, t in engine.tensors().items()}
    return {name: part.detach().clone().view(torch.int32) for name, part in local.items()}


def follow(
    layout: Layout,
    stage: int,
    adamw: OptimizerConfig = ADAMW,
    config: ModelConfig = MODEL,
    dropout: DropoutConfig | None = None,
    **zero: Any,
) -> Errors:
    """Train and evaluate, and compare each step and the weights after it."""
    engine = make_engine(layout, stage, adamw, config, dropout=dropout, **zero)
    return _train(engine, Expected(Oracle, config, SEED, adamw, None, dropout))


def adapted(layout: Layout, stage: int, **zero: Any) -> Errors:
    """Train adapters, of which B is not zero, with clipping."""
    with random_b():
        engine = make_engine(layout, stage, _CLIPPED, lora=ADAPTERS, **zero)
        oracle = Expected(LoRAOracle, MODEL, SEED, _CLIPPED, ADAPTERS)
    base = {name: view.flat.clone() for name, view in engine.base_weights().items()}  # type: ignore[attr-defined]
    errors = _train(engine, oracle)
    after = engine.base_weights()
    errors["changed base"] = float(any(not torch.equal(after[n].flat, flat) for n, flat in base.items()))  # type: ignore[attr-defined]
    return errors | {"base in the checkpoint": float(bool(base.keys() & engine.tensors().keys()))}


def _train(engine: DeepSpeedEngine, oracle: Expected) -> Errors:
    """Take steps, of which the first has half the rows, and after it one that must be left out."""
    errors: Errors = {"initial weights": weight_error(engine, oracle)}
    batches = make_batches()
    for number, (batch, lr) in enumerate(zip(batches, RATES, strict=True)):
        before, rows = snapshot(engine), ROWS // 2 if number == 0 else ROWS
        merge(errors, eval_error(engine, oracle, batches[number - 1]))
        merge(errors, {"changed by an evaluation": changed(before, snapshot(engine))})
        output = engine.train_step(share_of(batch, engine.parallel, rows), lr)
        merge(errors, step_errors(output, oracle.step(first_rows(batch, rows), lr)))
        if number == 0:
            merge(errors, left_out(engine))
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


@functools.cache
def first_rows(batch: GlobalBatch, rows: int) -> GlobalBatch:
    parts = (batch.tokens[:rows], batch.labels[:rows], batch.mask[:rows], batch.block_ids[:rows])
    return GlobalBatch(*parts, step=batch.step)


def left_out(engine: DeepSpeedEngine) -> Errors:
    """Give the last data-parallel rank a mask that is no number: all leave the step out."""
    batch = share_of(make_batches()[0], engine.parallel)
    if engine.parallel.data_rank == engine.parallel.data_parallel_size - 1:
        batch.loss_mask[0, 0] = math.nan
    before = snapshot(engine)
    output = engine.train_step(batch, RATES[1])
    output.wait()
    return {
        "not skipped": float(not output.skipped),
        "loss hides it": float(math.isfinite(output.loss)),
        "norm hides it": float(math.isfinite(output.grad_norm)),
        "changed by a skipped step": changed(before, snapshot(engine)),
    }


def complete(stage: int, **zero: Any) -> Errors:
    """Train with clipping on two data-parallel ranks; then write the state into another engine, once before that has
    computed anything and once after; then look where DeepSpeed keeps it."""
    donor, oracle = make_engine(_DP2, stage, _CLIPPED, **zero), Expected(Oracle, MODEL, SEED, _CLIPPED)
    errors = _train(donor, oracle)
    engine, batches = make_engine(_DP2, stage, _CLIPPED, seed=9, **zero), make_batches()
    for number in range(2):
        given = donor.tensors()
        for name, tensor in engine.tensors().items():
            source = given[name]
            (tensor.flat if isinstance(tensor, FlatShard) else tensor).copy_(
                source.flat if isinstance(source, FlatShard) else source
            )
        engine.loaded()
        merge(errors, eval_error(engine, oracle, batches[1 - number]))
        (donor if number == 0 else engine).train_step(share_of(batches[number], donor.parallel), RATES[number])
        oracle.step(batches[number], RATES[number])
    output = engine.train_step(share_of(batches[2], engine.parallel), RATES[2])
    merge(errors, step_errors(output, oracle.step(batches[2], RATES[2])))
    merge(errors, {"weights after loading": weight_error(engine, oracle)})
    return errors | (names(engine, stage, zero) if stage else {})


def names(engine: DeepSpeedEngine, stage: int, zero: dict[str, Any]) -> Errors:
    """Check what DeepSpeed's private names are taken for, each by itself: 0 where it is that. The weights are lost."""
    import deepspeed

    optimizer, partitions = engine._engine.optimizer, engine._partitions
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    states = [optimizer.optimizer.state[flat] for flat in flats]

    def is_part_of(part: torch.Tensor, flats: Iterable[torch.Tensor]) -> bool:
        addresses = [flat.untyped_storage().data_ptr() for flat in flats]
        return part.numel() == 0 or part.untyped_storage().data_ptr() in addresses

    parameters = list(engine._weights.values())
    errors: Errors = {
        "fp32 weights": float(not all(is_part_of(partitions.part(p)[0], flats) for p in parameters)),
        **{
            moment: float(
                not all(is_part_of(partitions.part(p, moment)[0], [s[moment] for s in states]) for p in parameters)
            )
            for moment in ("exp_avg", "exp_avg_sq")
        },
    }
    for flat in flats:
        flat.detach().fill_(2.0)
    engine.eval_step(share_of(make_batches()[0], engine.parallel)).wait()  # which may leave copies of the old ones
    engine.loaded()
    copies = [p.ds_secondary_tensor for p in parameters] if stage == 3 else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        errors["not where the model computes"] = float(any((p.data != 2.0).any() for p in parameters))
    if stage == 3:
        small = optimizer.persistent_parameters
        ranks = {optimizer._get_param_partition_rank(p) for p in parameters}
        errors |= {
            "small weights": float(bool(small) != ("stage3_param_persistence_threshold" in zero)),
            "rank": float(ranks != {engine.parallel.mesh.get_local_rank("shard")}),
            "second copies": float(any(copy is not None for copy in copies)),
        }
    return errors


WIDE = dataclasses.replace(
    TOY,
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=128,
    vocab_size=250,
    max_position_embeddings=32,
    init_method_std=0.02,
)
"""Of the runs in bf16: in a narrower model, single roundings weigh more."""


BF16_ADAMW = dataclasses.replace(ADAMW, adam_eps=1e-8, clip_grad=0.5)


def bf16_losses(engine: Engine) -> list[float]:
    """Return the losses of ten steps, with warm-up and clipping."""
    generator = torch.Generator().manual_seed(6)
    losses = []
    for step in range(10):
        tokens = torch.randint(0, 250, (ROWS, 33), generator=generator)
        mask = (torch.rand(ROWS, 32, generator=generator) < torch.linspace(0.3, 1.0, ROWS)[:, None]).float()
        batch = GlobalBatch(tokens[:, :-1], tokens[:, 1:], mask, list(range(ROWS)))
        output = engine.train_step(share_of(batch, engine.parallel), 1e-3 * min(1.0, (step + 1) / 4))
        losses.append(output.loss)
    return losses


def bf16_engine(stage: int, zero: dict[str, Any]) -> DeepSpeedEngine:
    """On two ranks, with what --bf16 makes of the configuration."""
    parallel = parallel_state(ParallelConfig(**{SHARDING: STRATEGIES[stage]}))
    (model,) = build_stages(WIDE, parallel, compute_dtype=torch.bfloat16)
    given = settings(stage, BF16_ADAMW, bf16=True, **zero)
    engine = DeepSpeedEngine(model, BF16_ADAMW, parallel, given, micro_batch_size=2, seed=SEED)
    assert all(tensor.dtype == torch.float32 for tensor in engine.tensors().values())
    return engine


def bf16(name: str) -> tuple[list[float], Errors]:
    """Return the losses of a case of BF16, and whether its engine leaves out a step that is no number, and no other."""
    engine = bf16_engine(*BF16[name])
    losses, errors = bf16_losses(engine), left_out(engine)
    output = engine.train_step(share_of(make_batches()[1], engine.parallel), RATES[1])
    output.wait()
    return losses, errors | {"the next step is skipped": float(output.skipped)}


def native_bf16_engine() -> NativeEngine:
    """On one process."""
    parallel = initialize()
    stages = shard_stages(build_stages(WIDE, parallel, compute_dtype=torch.bfloat16), parallel, SEED)
    return NativeEngine(stages, BF16_ADAMW, parallel, seq_length=32, micro_batch_size=1, global_batch_size=ROWS)


_DP2, _TP2, _TP2_SP, _CP2 = (
    Layout(2, rows, flags) for rows, flags in ((2, {}), (4, {TP: 2}), (4, TP2_SP), (4, {CP: 2}))
)
_CLIPPED = dataclasses.replace(ADAMW, clip_grad=0.05)
_CPU = {"device": "cpu", "pin_memory": True}
_OFFLOADED = {"offload_optimizer": _CPU}
_ALL_OFFLOADED = {**_OFFLOADED, "offload_param": _CPU}
_UNTIED = dataclasses.replace(MODEL, untie_embeddings_and_output_weights=True)
_SMALL = {"stage3_param_persistence_threshold": 100}
CASES: dict[int, dict[str, Callable[[], Errors]]] = {
    2: {
        **{f"DP2, ZeRO-{stage}": functools.partial(complete, stage) for stage in range(4)},
        "DP2, ZeRO-1, offloaded": lambda: complete(1, **_OFFLOADED),
        "DP2, ZeRO-3, all offloaded": lambda: complete(3, **_ALL_OFFLOADED),
        "DP2, ZeRO-3, hpZ, small weights on every rank": lambda: complete(3, zero_hpz_partition_size=2, **_SMALL),
        "DP2, ZeRO-2, offloaded": lambda: follow(_DP2, 2, _CLIPPED, **_OFFLOADED),
        "TP2, ZeRO-2, offloaded": lambda: follow(_TP2, 2, _CLIPPED, **_OFFLOADED),
        **{f"TP2 SP, ZeRO-{n}, untied": functools.partial(follow, _TP2_SP, n, _CLIPPED, _UNTIED) for n in range(4)},
        **{f"CP2, ZeRO-{stage}": functools.partial(follow, _CP2, stage) for stage in (1, 3)},
        **{f"DP2, ZeRO-{stage}, adapters": functools.partial(adapted, _DP2, stage) for stage in (0, 2)},
        "TP2, ZeRO-1, adapters": lambda: adapted(_TP2, 1),
        "TP2 SP, ZeRO-2, adapters": lambda: adapted(_TP2_SP, 2),
        "CP2, ZeRO-2, adapters, offloaded": lambda: adapted(_CP2, 2, **_OFFLOADED),
        "DP2, ZeRO-3, dropout": lambda: follow(_DP2, 3, dropout=DROPOUT),
    },
    4: {"DP4, ZeRO-3, hpZ": lambda: follow(Layout(4, 1, {}), 3, zero_hpz_partition_size=2)},
}
"""What so many ranks do, by name."""
BF16: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"ZeRO-{stage}": (stage, {}) for stage in range(4)},
    **{f"ZeRO-{stage}, offloaded": (stage, _OFFLOADED) for stage in (1, 2)},
    "ZeRO-3, all offloaded": (3, _ALL_OFFLOADED),
}
"""Ten steps in bf16 on two ranks: name → (stage, its settings)."""


def main(
    rank: int, ranks: int, folder: str, runs: Sequence[matrix.Case], killed: matrix.Case | None, prefixes: list[str]
) -> None:
    """Compute the errors of all cases of so many ranks, and on two ranks the losses in bf16 and the memory, and write
    them into `folder`; then train the runs into it, and last one that is killed."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT))
    results: dict[str, Any] = {"errors": {name: case() for name, case in CASES.get(ranks, {}).items()}}
    if ranks == 2:
        results["bf16"] = {name: bf16(name) for name in BF16}
        results["memory"] = {name: case.measured() for name, case in deepspeed_memory.CASES.items()}
    Path(folder, f"{rank} of {ranks}.json").write_text(json.dumps(results))
    matrix.run_here(runs, Path(folder), prefixes)
    if killed is not None:
        _kill_in_second_save(rank)
        matrix.run_here([killed], Path(folder), prefixes)
    dist.destroy_process_group()


def _kill_in_second_save(rank: int) -> None:
    """Kill rank 1 in the second save from here: its files are written in part."""
    write, saves = CheckpointStore._write_files, 0

    def die(self: CheckpointStore, aside: Path, *arguments: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves == 2 and rank == 1:
            (aside / "partial.safetensors").write_bytes(b"partial")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, aside, *arguments)

    CheckpointStore._write_files = die  # type: ignore[method-assign]
