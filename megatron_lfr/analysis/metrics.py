"""What metrics.jsonl says about a run: its evaluations, and where its time went."""

from __future__ import annotations

from typing import Any

from megatron_lfr.analysis.overview import RunView
from megatron_lfr.output import is_number


def evaluations(run: RunView) -> list[dict[str, Any]]:
    """Return the evaluations of a run, in the order of their steps; of several at one step, the last."""
    by_step = {row["step"]: row for row in run.event_rows("evaluation") if is_number(row.get("loss"))}
    return [by_step[step] for step in sorted(by_step)]


def domain_losses(row: dict[str, Any]) -> dict[str, Any]:
    """Return the losses by domain of an evaluation; empty where it has none."""
    domains = row.get("domains")
    return domains if isinstance(domains, dict) else {}


def domain_names(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of all domains in evaluations, in the order in which they first occur."""
    return list(dict.fromkeys(name for row in rows for name in domain_losses(row)))


def seconds_spent(run: RunView) -> dict[str, float]:
    """Return the seconds that each part of the work took, from metrics.jsonl; the parts add up to the wall time."""
    processes: dict[str, dict[str, float]] = {}  # each process counts from its start: its last entry is its total
    for event in run.events:
        times = event.get("time")
        parts = times.get("parts") if isinstance(times, dict) else None
        if isinstance(times, dict) and isinstance(parts, dict):
            known = {str(name): float(value) for name, value in parts.items() if is_number(value) and value >= 0}
            processes[str(times.get("started"))] = known
    names = dict.fromkeys(name for parts in processes.values() for name in parts)
    return {name: sum(parts.get(name, 0.0) for parts in processes.values()) for name in names}


def lfr_seconds(spent: dict[str, float]) -> float:
    """Return how many of these seconds Learn-Focus-Review itself took."""
    return spent.get("recording losses", 0.0) + spent.get("making orders", 0.0)
