"""Compares a benchmark's result with an earlier one."""

from __future__ import annotations

from typing import Any

from megatron_lfr.benchmark.statistics import ratio
from megatron_lfr.output import print_table


def print_comparison(new: dict[str, Any], old: dict[str, Any]) -> None:
    """Print ratios, new to old, and what else differs between the two."""
    for line in differences(new, old):
        print(f"differs: {line}")
    middle, low, high = ratio(new["step_seconds"]["all"], old["step_seconds"]["all"])
    rows = [["step", *(f"{value:.3f}" for value in (middle, low, high))]]
    for name, part in new["parts"].items():
        before = old["parts"].get(name, {}).get("mean", 0.0)
        rows.append([name, f"{part['mean'] / before:.3f}" if before > 0 else "-", "", ""])
    verdict = "faster" if high < 1 else "slower" if low > 1 else "no difference that these steps show"
    print_table(["new / old", "time", "from", "to (95 %)"], rows, f"Against the earlier result: {verdict}")


def differences(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Describe what differs between two results but the times, a line each."""
    pairs = [(key, old.get(key), new.get(key)) for key in ("device", "ranks", "threads", "torch", "data", "parameters")]
    before, after = old.get("settings"), new["settings"]
    before = before if isinstance(before, dict) else {}
    pairs += [(key, before.get(key, "default"), after.get(key, "default")) for key in sorted({*before, *after})]
    return [f"{key}: {was} before, {now} now" for key, was, now in pairs if was != now]
