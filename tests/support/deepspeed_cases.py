"""What the ranks of DeepSpeed's tests run, against the native engine's oracle."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lfr.engine import build_stages
from megatron_lfr.engine.deepspeed import DeepSpeedEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.parallel import initialize
from megatron_lfr.parallel.flat_shard import FlatShard
from support.engine_cases import (
    ADAMW,
    CP,
    RATES,
    SEED,
    SHARDING,
    TOY,
    TP,
    Found,
    Layout,
    changed,
    eval_error,
    make_batches,
    merge,
    share_of,
    step_errors,
)
from support.engine_oracle import Oracle
from support.waiting import LIMIT

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


def settings(stage: int, clip_grad: float, **zero: Any) -> dict[str, Any]:
    """What DeepSpeed is given; small buckets, and nothing kept whole at stage 3."""
    sizes = {"reduce_bucket_size": 500, "allgather_bucket_size": 500} if stage else {}
    if stage == 3:
        sizes |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_grad if stage else 0.0,
        "steps_per_print": None,
        "zero_optimization": {"stage": stage, **sizes, **zero},
        "zero_allow_untested_optimizer": True,
    }


def make_engine(
    layout: Layout, stage: int, adamw: OptimizerConfig = ADAMW, seed: int = SEED, **zero: Any
) -> DeepSpeedEngine:
    parallel = initialize(dataclasses.replace(layout.config, **{SHARDING: STRATEGIES[stage]}))
    (model,) = build_stages(TOY, parallel, compute_dtype=zero.pop("compute_dtype", torch.float32))
    model.empty_on(parallel.device)
    model.init_weights(seed)
    return DeepSpeedEngine(
        model, adamw, parallel, settings(stage, adamw.clip_grad, **zero), micro_batch_size=layout.micro_batch
    )


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, fp64, from all ranks; each element must come from somewhere, and be equal everywhere."""
    assert isinstance(tensor, FlatShard)
    sums, counts = torch.zeros(2, *tensor.shape, dtype=torch.float64)
    for at, piece in tensor.pieces.items():
        where = tuple(slice(first, first + size) for first, size in zip(at, piece.shape, strict=True))
        sums[where] += piece
        counts[where] += 1
    for part in (sums, counts):
        dist.all_reduce(part)
    return sums / counts


def weight_error(engine: DeepSpeedEngine, oracle: Oracle) -> float:
    errors = []
    for name, weight in engine.weights().items():
        expected = oracle.weights[name.removeprefix("model.")].detach()
        errors.append(float((gathered(weight) - expected).norm() / expected.norm()))
    return max(errors)


def snapshot(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The bits of this rank's part of all that training continues from."""
    local = {n: t.flat if isinstance(t, FlatShard) else t for n, t in engine.tensors().items()}
    return {name: part.detach().clone().view(torch.int32) for name, part in local.items()}


def follow(layout: Layout, stage: int, adamw: OptimizerConfig = ADAMW, **zero: Any) -> Found:
    """Train and evaluate, and compare each step and the weights after it."""
    engine, oracle = make_engine(layout, stage, adamw, **zero), Oracle(TOY, SEED, adamw)
    found: Found = {}
    batches = make_batches()
    for number, (batch, lr) in enumerate(zip(batches, RATES, strict=True)):
        before = snapshot(engine)
        merge(found, eval_error(engine, oracle, batches[number - 1]))
        merge(found, {"changed by an evaluation": changed(before, snapshot(engine))})
        output = engine.train_step(share_of(batch, engine.parallel), lr)
        merge(found, step_errors(output, oracle.step(batch, lr)))
    merge(found, {"weights": weight_error(engine, oracle)})
    return found


def not_finite(layout: Layout, stage: int) -> Found:
    """The last data-parallel rank has a mask that is no number: all leave the step out, and the next is right."""
    first, second, _ = make_batches()
    engine, oracle = make_engine(layout, stage), Oracle(TOY, SEED, ADAMW)
    output = engine.train_step(share_of(first, engine.parallel), RATES[0])
    found = step_errors(output, oracle.step(first, RATES[0]))
    batch = share_of(first, engine.parallel)
    if engine.parallel.data_rank == engine.parallel.data_parallel_size - 1:
        batch.loss_mask[0, 0] = math.nan
    before = snapshot(engine)
    output = engine.train_step(batch, RATES[1])
    output.wait()
    found |= {
        "not skipped": float(not output.skipped),
        "loss hides it": float(math.isfinite(output.loss)),
        "norm hides it": float(math.isfinite(output.grad_norm)),
        "changed by a skipped step": changed(before, snapshot(engine)),
    }
    output = engine.train_step(share_of(second, engine.parallel), RATES[1])
    merge(found, step_errors(output, oracle.step(second, RATES[1])))
    merge(found, {"weights": weight_error(engine, oracle)})
    return found


def load(layout: Layout, stage: int, **zero: Any) -> Found:
    """Write another engine's state into an engine's tensors, once before it has computed anything and once after."""
    batches = make_batches()
    engine, donor = make_engine(layout, stage, **zero), make_engine(layout, stage, seed=9, **zero)
    oracle = Oracle(TOY, 9, ADAMW)
    found: Found = {}
    for number in range(2):
        donor.train_step(share_of(batches[number], donor.parallel), RATES[number])
        oracle.step(batches[number], RATES[number])
        given = donor.tensors()
        for name, tensor in engine.tensors().items():
            source = given[name]
            (tensor.flat if isinstance(tensor, FlatShard) else tensor).copy_(
                source.flat if isinstance(source, FlatShard) else source
            )
        engine.loaded()
        merge(found, eval_error(engine, oracle, batches[1 - number]))
    output = engine.train_step(share_of(batches[2], engine.parallel), RATES[2])
    merge(found, step_errors(output, oracle.step(batches[2], RATES[2])))
    merge(found, {"weights": weight_error(engine, oracle)})
    return found


def bf16(layout: Layout, stage: int) -> Found:
    """Layers compute in bf16, weights and the optimizer's state stay fp32."""
    engine, oracle = make_engine(layout, stage, compute_dtype=torch.bfloat16), Oracle(TOY, SEED, ADAMW)
    errors = []
    for batch, lr in zip(make_batches(), RATES, strict=True):
        errors.append(step_errors(engine.train_step(share_of(batch, engine.parallel), lr), oracle.step(batch, lr)))
    return {
        "bf16 loss": max(error["loss"] for error in errors),
        "count": max(error["count"] for error in errors),
        "not computed in bf16": float(errors[0]["loss"] < 1e-6),
        "weights or state not fp32": float(any(t.dtype != torch.float32 for t in engine.tensors().values())),
    }


_TP2, _TP2_SP, _CP2 = {TP: 2}, {TP: 2, "sequence_parallel": True}, {CP: 2}
_CLIPPED = dataclasses.replace(ADAMW, clip_grad=0.05)
CASES: dict[str, tuple[int, Callable[[], Found]]] = {
    "DP2, ZeRO-3, loaded, small weights on every rank": (
        2,
        lambda: load(Layout(2, 2, {}), 3, stage3_param_persistence_threshold=100),
    ),
    "one rank, ZeRO-2": (1, lambda: follow(Layout(1, 2, {}), 2)),
    **{
        name: (2, functools.partial(case, Layout(2, rows, flags), stage, *more))
        for stage in range(4)
        for name, case, rows, flags, more in (
            (f"DP2, ZeRO-{stage}, clipped", follow, 1, {}, (_CLIPPED,)),
            (f"DP2, ZeRO-{stage}, not finite", not_finite, 2, {}, ()),
            (f"TP2, ZeRO-{stage}, clipped", follow, 4, _TP2, (_CLIPPED,)),
            (f"TP2 SP, ZeRO-{stage}", follow, 4, _TP2_SP, ()),
            (f"CP2, ZeRO-{stage}", follow, 4, _CP2, ()),
            (f"DP2, ZeRO-{stage}, loaded", load, 2, {}, ()),
            (f"DP2, ZeRO-{stage}, bf16", bf16, 2, {}, ()),
        )
    },
}
"""Name → (ranks, case)."""


def main(rank: int, ranks: int, folder: str) -> None:
    """Run the cases for `ranks` ranks, and write what each found into `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT))
    found = {name: case() for name, (needed, case) in CASES.items() if needed == ranks}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
