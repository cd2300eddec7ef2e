"""How far an engine is from the oracle: errors by name, and their bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_lfr.engine.base import BlockLosses, StepLosses
from megatron_lfr.engine.native import NativeEngine
from support.engine_layouts import share_of
from support.engine_oracle import Expected, GlobalBatch, Step

Errors = dict[str, float]


BOUNDS = {"loss": 1e-5, "nll": 1e-5, "grad_norm": 1e-5, "weights": 1e-4, "eval": 1e-5, "bf16 loss": 3e-2}
"""Of errors; quantities that are not here are exact: 0."""


def block_error(blocks: BlockLosses, nll_sum: Tensor, count: Tensor) -> tuple[float, float]:
    """Largest errors of losses, in nats a token, and of counts; inf for a loss that is no number."""
    sums, counts = torch.from_numpy(blocks)
    errors = (sums.double() - nll_sum).abs() / count.clamp(min=1)
    return float(errors.nan_to_num(nan=math.inf).max()), float((counts - count).abs().max())


def step_errors(output: StepLosses, expected: Step) -> Errors:
    nll, count = block_error(output.wait(), expected.nll_sum, expected.count)
    return {
        "loss": abs(output.loss - expected.loss),
        "nll": nll,
        "count": count,
        "grad_norm": abs(output.grad_norm / expected.grad_norm - 1),
        "skipped": float(output.skipped),
    }


def weight_error(engine: NativeEngine, oracle: Expected) -> float:
    """Relative L2 distance of the worst weight of this rank's stages."""
    errors = []
    for name, weight in engine.weights().items():
        assert isinstance(weight, DTensor)
        expected = oracle.weights[name.removeprefix("model.")].detach()
        errors.append(float((weight.full_tensor().double() - expected).norm() / expected.norm()))
    return max(errors)


def merge(errors: Errors, more: Errors) -> None:
    """Keep the larger of each error; one that is no number counts as infinite."""
    for name, value in more.items():
        errors[name] = max(errors.get(name, 0.0), math.inf if math.isnan(value) else value)


def eval_error(engine: NativeEngine, oracle: Expected, batch: GlobalBatch) -> Errors:
    nll_sum, count = oracle.evaluate(batch)
    rows = engine.eval_rows
    nll, counts = block_error(
        engine.eval_step(share_of(batch, engine.parallel, rows)).wait(), nll_sum[:rows], count[:rows]
    )
    return {"eval": nll, "eval count": counts}


def snapshot(engine: NativeEngine) -> dict[str, Tensor]:
    """Return the bits of this rank's part of all that training continues from."""
    return bits(engine.tensors())


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {name: part.detach().clone().view(torch.int32) for name, part in local.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """0 where both hold the same bits."""
    return float(before.keys() != after.keys() or any(not torch.equal(t, after[n]) for n, t in before.items()))
