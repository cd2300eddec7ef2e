"""Steps and evaluations of an engine, in every option, against the oracle."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

from megatron_lfr.engine.optimizer import OptimizerConfig
from support.engine_errors import BOUNDS, Errors, changed, eval_error, merge, snapshot, step_errors, weight_error
from support.engine_layouts import (
    ADAMW,
    CAPPED,
    DROPOUT,
    LOSS,
    RATES,
    SEED,
    TOY,
    Layout,
    make_batches,
    make_engine,
    share_of,
)
from support.engine_oracle import Expected, Oracle
from support.flex_on_cpu import flex_on_cpu


def follow(
    layout: Layout, documents: bool = False, adamw: OptimizerConfig = ADAMW, steps: int = 3, **options: Any
) -> Errors:
    """Train, and compare each step and the weights after it."""
    engine = make_engine(layout, adamw, **options)
    oracle = Expected(Oracle, options.get("config", TOY), SEED, adamw, options.get("loss"), options.get("dropout"))
    errors: Errors = {}
    for batch, lr in zip(make_batches(documents)[:steps], RATES, strict=False):
        output = engine.train_step(share_of(batch, engine.parallel), lr)
        merge(errors, step_errors(output, oracle.step(batch, lr)))
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


def dropped(layout: Layout, **options: Any) -> Errors:
    """Dropout: the masks of the oracle in training, which change its loss, and none in an evaluation."""
    errors = follow(layout, dropout=DROPOUT, **options)
    batch, plain = make_batches()[0], Expected(Oracle, TOY, SEED, ADAMW)
    merge(errors, eval_error(make_engine(layout, dropout=DROPOUT, **options), plain, batch))
    oracles = Expected(Oracle, TOY, SEED, ADAMW, None, DROPOUT), plain
    losses = [oracle.step(batch, RATES[0]).loss for oracle in oracles]
    return errors | {"drops nothing": float(abs(losses[0] - losses[1]) < 1e-3)}


def evaluate(layout: Layout) -> Errors:
    """Take steps with evaluations between them: both are right, and an evaluation changes no bit."""
    batches = make_batches()
    engine, oracle = make_engine(layout), Expected(Oracle, TOY, SEED, ADAMW)
    errors: Errors = {}
    for number, (batch, lr) in enumerate(zip(batches, RATES, strict=True)):
        before = snapshot(engine)
        merge(errors, eval_error(engine, oracle, batches[number - 1]))
        merge(errors, {"changed by an evaluation": changed(before, snapshot(engine))})
        merge(errors, step_errors(engine.train_step(share_of(batch, engine.parallel), lr), oracle.step(batch, lr)))
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


def undisturbed(layout: Layout) -> Errors:
    """Take steps with evaluations between them, and without: the same bits."""
    batches = make_batches()
    plain, engine = make_engine(layout), make_engine(layout)
    errors: Errors = {}
    for batch, other, lr in zip(batches, batches[1:], RATES, strict=False):
        engine.eval_step(share_of(other, engine.parallel, engine.eval_rows)).wait()
        losses = [e.train_step(share_of(batch, e.parallel), lr).loss for e in (plain, engine)]
        merge(errors, {"other loss after an evaluation": float(losses[0] != losses[1])})
    merge(errors, {"other weights after evaluations": changed(snapshot(plain), snapshot(engine))})
    return errors


def minimised(layout: Layout) -> Errors:
    """Take steps on capped logits with all that the loss can have, which no recorded and no evaluated loss has."""
    batch, other = make_batches()[:2]
    engine = make_engine(layout, config=CAPPED, loss=LOSS)
    oracle, plain = Expected(Oracle, CAPPED, SEED, ADAMW, LOSS), Expected(Oracle, CAPPED, SEED, ADAMW)
    errors = eval_error(engine, oracle, other)
    steps = [expected.step(batch, RATES[0]) for expected in (oracle, plain)]
    errors["the same loss"] = float(abs(steps[0].loss - steps[1].loss) < 0.1)
    merge(errors, step_errors(engine.train_step(share_of(batch, engine.parallel), RATES[0]), steps[0]))
    merge(errors, eval_error(engine, oracle, other))
    merge(
        errors, step_errors(engine.train_step(share_of(other, engine.parallel), RATES[1]), oracle.step(other, RATES[1]))
    )
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


def load(layout: Layout) -> Errors:
    """Write another engine's state into an engine's tensors, once before it has computed anything and once after."""
    batches = make_batches()
    engine, donor, oracle = make_engine(layout), make_engine(layout, seed=9), Expected(Oracle, TOY, 9, ADAMW)
    errors: Errors = {}
    for number in range(2):
        donor.train_step(share_of(batches[number], donor.parallel), RATES[number])
        oracle.step(batches[number], RATES[number])
        given = donor.tensors()
        for name, tensor in engine.tensors().items():
            source = given[name]
            if isinstance(tensor, DTensor):
                assert isinstance(source, DTensor)
                tensor.to_local().copy_(source.to_local())
            else:
                tensor.copy_(source)
        merge(errors, eval_error(engine, oracle, batches[1 - number]))
    expected = oracle.step(batches[2], RATES[2])
    merge(errors, step_errors(engine.train_step(share_of(batches[2], engine.parallel), RATES[2]), expected))
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


def clipping(layout: Layout, limit: float) -> Errors:
    """Clipped at `limit`, 0 for not at all; Adam must not hide a wrong scale."""
    adamw, other = (dataclasses.replace(ADAMW, clip_grad=value) for value in (limit, 0.0 if limit else 0.05))
    errors = follow(layout, adamw=adamw)
    right, wrong = Expected(Oracle, TOY, SEED, adamw), Expected(Oracle, TOY, SEED, other)
    for batch, lr in zip(make_batches(), RATES, strict=True):
        norms = right.step(batch, lr).grad_norm, wrong.step(batch, lr).grad_norm
        merge(errors, {"nothing to clip": float(min(norms) < 0.1)})
    distances = [float((w - wrong.weights[n]).norm() / w.norm()) for n, w in right.weights.items()]
    errors["clipping does not show"] = float(max(distances) < 100 * BOUNDS["weights"])
    return errors


def bf16(layout: Layout) -> Errors:
    """Layers compute in bf16, weights and the optimizer's state stay fp32."""
    engine = make_engine(layout, compute_dtype=torch.bfloat16)
    oracle = Expected(Oracle, TOY, SEED, ADAMW)
    errors = []
    for batch, lr in zip(make_batches(), RATES, strict=True):
        output = engine.train_step(share_of(batch, engine.parallel), lr)
        errors.append(step_errors(output, oracle.step(batch, lr)))
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    return {
        "bf16 loss": max(error["loss"] for error in errors),
        "count": max(error["count"] for error in errors),
        "not computed in bf16": float(errors[0]["loss"] < 1e-6),
        "weights not fp32": float(any(p.local().dtype != torch.float32 for p in engine.parameters)),
        "state not fp32": float(any(value.dtype != torch.float32 for value in states)),
        "no state": float(len(states) != 3 * len(engine.parameters)),
    }


def compiled(layout: Layout, follow: Callable[..., Errors], backend: str, **options: Any) -> Errors:
    """Compiled layers, two for speed; a layer is one graph. Its loops are not vectorised: that takes the C++ compiler
    twice as long, and is no matter of layers."""
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.cpp.simdlen = 1
    torch._dynamo.reset()
    config = dataclasses.replace(CAPPED, num_layers=2)
    with patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        errors = follow(layout, steps=2, config=config, loss=LOSS, compile_layers=True, **options)
    counters = torch._dynamo.utils.counters
    errors["graph breaks"] = float(sum(counters["graph_break"].values()))
    errors["not compiled"] = float(counters["stats"]["unique_graphs"] < 1)
    return errors


def flex(layout: Layout, documents: bool = True, **options: Any) -> Errors:
    """Attention by flex_attention's block masks."""
    with flex_on_cpu():
        return follow(layout, documents=documents, steps=2, attention_backend="flex", **options)
