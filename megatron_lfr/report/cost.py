"""Section on what Learn-Focus-Review costs on top of training."""

from __future__ import annotations

from typing import Any

from megatron_lfr.report.bars import Bar, stacked_bars
from megatron_lfr.report.frame import figure, legend
from megatron_lfr.report.markup import Html, element, join
from megatron_lfr.report.scale import is_number, percent, si
from megatron_lfr.report.tables import table
from megatron_lfr.report.view import RunView

_KINDS = ("s5", "s0", "s4", "s1", "s3", "s2")


def cost_section(view: RunView) -> Html:
    """Where the time went, and the bytes on disk."""
    spent = seconds_spent(view)
    if not any(spent.values()):
        return element("p", "metrics.jsonl holds no times yet.", class_="note")
    total = sum(spent.values())
    parts = [(kind, name) for kind, name in zip(_KINDS, spent, strict=True) if spent[name]]
    plot = stacked_bars(
        [Bar("time", [spent[name] for _, name in parts])],
        [(f"part {kind}", name) for kind, name in parts],
        "Where the time went",
        width=800,
    )
    rows = [[name, f"{seconds:,.2f} s", percent(seconds / total, 2)] for name, seconds in spent.items()]
    numbers = table(["what", "time", "share"], rows)
    own = spent["recording losses"] + spent["making orders"]
    note = (
        f"Learn-Focus-Review itself took {own:,.2f} s, {percent(own / total, 2)} of {total:,.1f} s (of the process "
        "that logs; start-up and checkpoints are not in it)."
    )
    return join(
        [
            figure("Time", join([legend([(f"part {k}", n) for k, n in parts]), plot]), note, numbers, "mid"),
            _storage(view),
        ]
    )


def _storage(view: RunView) -> Html:
    draws = int(view.visits.sum())
    rescored = sum(phase.planned.phase.is_rescored for phase in view.phases)
    words = (
        f"Journal: {si(4 * draws)}B on disk, four bytes a visit. Scores in memory: {si(10 * view.run.plan.n_blocks)}B."
    )
    if rescored:
        tokens = rescored * view.run.plan.n_blocks * view.seq_length
        words += f" Rescoring read {si(tokens)} tokens forward-only, which the token counts of this page leave out."
    return element("p", words, class_="note")


def seconds_spent(view: RunView) -> dict[str, float]:
    """Seconds by what they were spent on, as far as metrics.jsonl says."""
    spent = dict.fromkeys(
        ("training steps", "waiting for data", "evaluation", "recording losses", "making orders", "rescoring"), 0.0
    )
    step_before = 0
    for row in view.event_rows("train"):
        steps = row["step"] - step_before
        step_before = row["step"]
        recording = steps * _time(row, "lfr_record_ms") / 1000
        waiting = steps * _time(row, "loader_wait_ms") / 1000
        spent["recording losses"] += recording
        spent["waiting for data"] += waiting
        spent["training steps"] += max(0.0, steps * _time(row, "step_ms") / 1000 - recording - waiting)
    spent["evaluation"] = sum(_time(row, "seconds") for row in view.event_rows("evaluation"))
    starts = view.event_rows("phase")
    spent["making orders"] = _grown([_time(row, "order_seconds") for row in starts])
    spent["rescoring"] = _grown([_time(row, "rescore_seconds") for row in starts])
    return spent


def _time(row: dict[str, Any], name: str) -> float:
    times = row.get("time")
    value = times.get(name, 0.0) if isinstance(times, dict) else 0.0
    return float(value) if is_number(value) and value >= 0 else 0.0


def _grown(counter: list[float]) -> float:
    """How much a counter that starts anew with every process has counted in all."""
    total, before = 0.0, 0.0
    for value in counter:
        total += value - before if value >= before else value
        before = value
    return total
