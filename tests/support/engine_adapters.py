"""Adapters that an engine trains, against the oracle."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from megatron_lfr.engine import build as engine_build
from megatron_lfr.engine.native import NativeEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.model.lora import LoRAConfig, add_adapters, init_adapters
from support.engine_errors import Errors, bits, changed, merge, snapshot, step_errors, weight_error
from support.engine_layouts import ADAMW, ADAPTERS, RATES, SEED, TOY, Layout, make_batches, make_engine, share_of
from support.engine_oracle import Expected, Oracle
from support.lora_oracle import LoRAOracle, random_b


def adapted(
    layout: Layout, adamw: OptimizerConfig = ADAMW, lora: LoRAConfig = ADAPTERS, steps: int = 2, **options: Any
) -> Errors:
    """Train adapters, of which B is not zero, so that all gradients show; nothing else of the model changes."""
    with random_b():
        engine = make_adapted(layout, lora, adamw, **options)
        oracle = Expected(LoRAOracle, options.get("config", TOY), SEED, adamw, lora, options.get("loss"))
    base = bits(engine.base_weights())
    errors: Errors = {"adapters at the start": weight_error(engine, oracle)}
    for batch, lr in zip(make_batches()[:steps], RATES, strict=False):
        output = engine.train_step(share_of(batch, engine.parallel), lr)
        merge(errors, step_errors(output, oracle.step(batch, lr)))
    merge(errors, {"weights": weight_error(engine, oracle), "changed base": changed(base, bits(engine.base_weights()))})
    return errors | {"base in the checkpoint": float(bool(base.keys() & engine.tensors().keys()))}


def make_adapted(layout: Layout, lora: LoRAConfig, *arguments: Any, **options: Any) -> NativeEngine:
    engine = make_engine(layout, *arguments, lora=lora, **options)
    for stage in engine.stages:
        init_adapters(stage, SEED)
    return engine


def adapted_in_bf16(layout: Layout) -> Errors:
    """Compare a frozen base in bf16 with one in fp32, which the layers round: the same bits; adapters stay fp32."""
    engine = make_adapted(layout, ADAPTERS, compute_dtype=torch.bfloat16)
    with patch.object(
        engine_build, "add_adapters", lambda model, lora, dtype: add_adapters(model, lora, torch.float32)
    ):
        other = make_adapted(layout, ADAPTERS, compute_dtype=torch.bfloat16)
    oracle, errors = Expected(Oracle, TOY, SEED, ADAMW), []
    for batch in make_batches()[:1]:
        outputs = [e.train_step(share_of(batch, e.parallel), 1e-2) for e in (engine, other)]
        errors.append(abs(outputs[0].loss - oracle.step(batch, 1e-2).loss))
    dtypes = [{weight.dtype for weight in e.base_weights().values()} for e in (engine, other)]
    return {
        "bf16 loss": max(errors),
        "other adapters than with fp32": changed(snapshot(engine), snapshot(other)),
        "base not in bf16": float(dtypes != [{torch.bfloat16}, {torch.float32}]),
        "adapters not fp32": float(any(tensor.dtype != torch.float32 for tensor in engine.tensors().values())),
    }
