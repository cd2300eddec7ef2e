"""What Learn-Focus-Review itself costs: recording, orders and rescoring, over the steps of the configured run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_lfr.data.corpus.block_values import BlockValues, numbers
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.journal import Journal
from megatron_lfr.lfr.ledger import Ledger
from megatron_lfr.lfr.start import start_phase


def time_orders(
    plan: Plan, journal: Journal, seed: int, arrays: Sequence[Mapping[str, BlockValues]]
) -> list[dict[str, Any]]:
    """Return for each phase of the plan the seconds that its order takes here, with losses that are drawn at random in
    the place of trained ones."""
    values = numbers(arrays)
    ledger, rng, rows = Ledger.of(plan), np.random.default_rng(seed), []
    for planned in plan.phases:
        # Kept scores are in a file that only a run has; the order takes as long from recorded losses.
        phase = dataclasses.replace(planned.phase, score="recorded") if planned.phase.keeps_scores else planned.phase
        started = time.perf_counter()
        scored = dataclasses.replace(planned, phase=phase)
        order = start_phase(plan, scored, ledger, seed, journal, values[planned.segment]).order
        seconds = time.perf_counter() - started
        losses = rng.gamma(4.0, 1.0, len(order)).astype(np.float32)
        ledger.record_phase(planned.first_step, planned.global_batch_size, order, losses)
        rows.append({"phase": f"{planned.index} {planned.phase.kind}", "samples": planned.samples, "seconds": seconds})
    return rows


def lfr_cost(
    plan: Plan,
    orders: list[dict[str, Any]],
    recording: float,
    step: float,
    losses_alone: float,
    eval_seconds_per_block: float | None,
) -> dict[str, Any]:
    """Return the seconds of each part for a step of the run, and their share of a step of `step` seconds. The sum of
    the losses over the ranks runs beside the next step, so it is named but not in the share."""
    rescored = sum(planned.phase.is_rescored for planned in plan.phases)
    passes = rescored * plan.n_blocks * (eval_seconds_per_block or 0.0)
    parts = {
        "recording_seconds": recording,
        "order_seconds": sum(row["seconds"] for row in orders) / plan.total_steps,
        "rescoring_seconds": passes / plan.total_steps,
    }
    return {
        **parts,
        "share_of_step": sum(parts.values()) / step,
        "losses_all_reduce_seconds_alone": losses_alone,
        "journal_bytes_per_step": 4 * plan.global_batch_size,
        "blocks": plan.n_blocks,
        "steps_of_the_run": plan.total_steps,
        "orders": orders,
    }
