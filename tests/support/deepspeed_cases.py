"""What the ranks of DeepSpeed's tests run, against the native engine's oracle."""

from __future__ import annotations

import dataclasses
import math
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
    RATES,
    SEED,
    SHARDING,
    TOY,
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
    (model,) = build_stages(TOY, parallel)
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


def not_finite(layout: Layout, stage: int, rank: int) -> Found:
    """A mask on one rank that is no number: the step is left out on all of them, and the next one is right."""
    first, second, _ = make_batches()
    engine, oracle = make_engine(layout, stage), Oracle(TOY, SEED, ADAMW)
    output = engine.train_step(share_of(first, engine.parallel), RATES[0])
    found = step_errors(output, oracle.step(first, RATES[0]))
    batch = share_of(first, engine.parallel)
    if dist.get_rank() == rank:
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
