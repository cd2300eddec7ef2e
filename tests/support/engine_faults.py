"""Numbers that are not finite, and requests to stop, on one rank of an engine."""

from __future__ import annotations

import math

import torch.distributed as dist

from megatron_lfr.config.training import TrainingConfig
from megatron_lfr.training.stopping import Stopping
from support.engine_errors import Errors, changed, merge, snapshot, step_errors, weight_error
from support.engine_layouts import ADAMW, RATES, SEED, TOY, Layout, make_batches, make_engine, share_of
from support.engine_oracle import Expected, Oracle


def not_finite(layout: Layout, rank: int, what: str) -> Errors:
    """Put in a value on one rank that is not finite: all leave out the step, and the next one is right."""
    first, second, _ = make_batches()
    engine, oracle = make_engine(layout), Expected(Oracle, TOY, SEED, ADAMW)
    output = engine.train_step(share_of(first, engine.parallel), RATES[0])
    errors = step_errors(output, oracle.step(first, RATES[0]))
    batch = share_of(first, engine.parallel)
    parameter = next(p for p in engine.parameters if p.name.endswith("qkv.weight"))
    weight = parameter.local()
    kept = float(weight[0, 0])
    finish = engine.gradients.finish

    def finish_with_infinity() -> None:
        finish()
        parameter.local_grad()[0, 0] = math.inf

    if dist.get_rank() == rank:
        if what == "weight":
            weight[0, 0] = math.nan
        elif what == "mask":
            batch.loss_mask[0, 0] = math.nan
        else:
            engine.gradients.finish = finish_with_infinity  # type: ignore[method-assign]
    before = snapshot(engine)
    output = engine.train_step(batch, RATES[1])
    output.wait()
    errors |= {
        "not skipped": float(not output.skipped),
        "loss hides it": float(math.isnan(output.loss) == (what == "gradient")),
        "norm hides it": float(math.isfinite(output.grad_norm)),
        "changed by a skipped step": changed(before, snapshot(engine)),
    }
    if what == "weight":
        weight[0, 0] = kept
    engine.gradients.finish = finish  # type: ignore[method-assign]
    expected = oracle.step(second, RATES[1])
    merge(errors, step_errors(engine.train_step(share_of(second, engine.parallel), RATES[1]), expected))
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


def stop(layout: Layout) -> Errors:
    """Each rank in turn asks to stop, then for a checkpoint, while a step computes; then none does."""
    engine = make_engine(layout)
    batch = share_of(make_batches()[0], engine.parallel)
    group = engine.parallel.control_group

    def agreed(number: int | None = None) -> tuple[str | None, bool]:
        stopping = Stopping(TrainingConfig(exit_interval=7), group)
        wait = stopping.ask(7 if number == 0 else 8, save=number == 1)
        engine.train_step(batch, 1e-3)
        saves = wait()
        return stopping.reason, saves

    errors = {}
    for asking in range(layout.ranks):
        mine = dist.get_rank() == asking
        reason = "--exit-interval 7" if mine else "another rank was asked to stop"
        errors[f"rank {asking} not heard"] = float(agreed(0 if mine else None) != (reason, False))
        errors[f"rank {asking} not saved for"] = float(agreed(1 if mine else None) != (None, True))
    errors["stopped unasked"] = float(agreed() != (None, False))
    return errors
