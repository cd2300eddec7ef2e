"""Reads what `megatron-lfr benchmark --json` has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lfr.output import is_number

FORMAT = 1
"""Version of the keys, which docs/benchmark.md has."""


def read_result(path: Path, flag: str) -> dict[str, Any]:
    """Read one result. ValueError names the flag and the file where it holds none."""
    return _checked(_read(path, flag), f"{flag} {path}")


def read_results(path: Path, flag: str) -> list[dict[str, Any]]:
    """Read one result, or those of a sweep's combinations that were measured."""
    document = _read(path, flag)
    if not isinstance(document, dict) or "sweep" not in document:
        return [_checked(document, f"{flag} {path}")]
    rows = document["sweep"] if isinstance(document["sweep"], list) else []
    results = [row["result"] for row in rows if isinstance(row, dict) and "result" in row]
    if not results:
        raise ValueError(f"{flag} {path}: a sweep of which nothing was measured")
    return [_checked(result, f"{flag} {path}") for result in results]


def _read(path: Path, flag: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{flag} {path}: not a JSON file") from None


def _checked(result: Any, source: str) -> dict[str, Any]:
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{source}: not a result of `megatron-lfr benchmark` of format {FORMAT}")
    steps = result.get("step_seconds")
    times = steps.get("all") if isinstance(steps, dict) else None
    if not isinstance(times, list) or not times or not all(is_number(one) and one > 0 for one in times):
        raise ValueError(f"{source}: has no times of steps (step_seconds.all)")
    parts = result.get("parts")
    if not isinstance(parts, dict) or not all(isinstance(v, dict) and is_number(v.get("mean")) for v in parts.values()):
        raise ValueError(f"{source}: has no times of parts")
    return result
