"""Section on what Learn-Focus-Review costs on top of training."""

from __future__ import annotations

from itertools import chain, repeat

from megatron_lfr.analysis.overview import RunView
from megatron_lfr.output import is_number
from megatron_lfr.report.bars import Bar, stacked_bars
from megatron_lfr.report.frame import figure, legend
from megatron_lfr.report.markup import Html, element, join
from megatron_lfr.report.scale import percent, si
from megatron_lfr.report.tables import table

_KINDS = ("s5", "s0", "s4", "s1", "s3", "s2", "s6", "s7", "other")


def cost_section(view: RunView) -> Html:
    """Where the time went, and the bytes on disk."""
    spent = seconds_spent(view)
    if not any(spent.values()):
        return element("p", "metrics.jsonl holds no times yet.", class_="note")
    total = sum(spent.values())
    parts = [(kind, name) for kind, name in zip(chain(_KINDS, repeat("other")), spent, strict=False) if spent[name]]
    plot = stacked_bars(
        [Bar("time", [spent[name] for _, name in parts])],
        [(f"part {kind}", name) for kind, name in parts],
        "Where the time went",
        width=800,
    )
    rows = [[name, f"{seconds:,.2f} s", percent(seconds / total, 2)] for name, seconds in spent.items()]
    numbers = table(["what", "time", "share"], rows)
    own = own_seconds(spent)
    note = (
        f"Learn-Focus-Review itself took {own:,.2f} s, {percent(own / total, 2)} of {total:,.1f} s (of the process "
        "that logs, from the start of training to its last entry in metrics.jsonl)."
    )
    return join(
        [
            figure("Time", join([legend([(f"part {k}", n) for k, n in parts]), plot]), note, numbers, "mid"),
            _storage(view),
        ]
    )


def _storage(view: RunView) -> Html:
    samples = int(view.visits.sum())
    rescored = sum(phase.planned.phase.is_rescored for phase in view.phases)
    scores = 10 * view.run.plan.n_blocks
    words = f"Journal: {si(4 * samples)}B on disk, four bytes a visit. Scores in memory: {si(scores)}B."
    if rescored:
        tokens = rescored * view.run.plan.n_blocks * view.seq_length
        words += f" Rescoring read {si(tokens)} tokens forward-only, which the token counts of this page leave out."
    return element("p", words, class_="note")


def seconds_spent(view: RunView) -> dict[str, float]:
    """Seconds by what they were spent on, as far as metrics.jsonl says: parts that add up to the wall time."""
    processes: dict[str, dict[str, float]] = {}  # each counts from its start: its last entry holds all of it
    for event in view.events:
        times = event.get("time")
        parts = times.get("parts") if isinstance(times, dict) else None
        if isinstance(times, dict) and isinstance(parts, dict):
            known = {str(name): float(value) for name, value in parts.items() if is_number(value) and value >= 0}
            processes[str(times.get("started"))] = known
    names = dict.fromkeys(name for parts in processes.values() for name in parts)
    return {name: sum(parts.get(name, 0.0) for parts in processes.values()) for name in names}


def own_seconds(spent: dict[str, float]) -> float:
    """What Learn-Focus-Review itself took of them."""
    return spent.get("recording losses", 0.0) + spent.get("making orders", 0.0)
