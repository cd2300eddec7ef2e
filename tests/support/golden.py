"""What must never change by accident, as stored in tests/golden. `make golden` stores what the present code does, and
prints what changed; `make golden NEW_RUN=1` also makes the stored run anew, where its format has changed on purpose.
Until then, the stored run goes on with the schedule that it began with, whatever the preset is now."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.golden_losses import STORED_RUN, golden_run, store_run
from support.golden_orders import all_orders

FOLDER = Path(__file__).parents[1] / "golden"
ORDERS = FOLDER / "orders.json"
LOSSES = FOLDER / "losses.json"
LOSSES_OF_STORED_RUN = FOLDER / "losses_of_stored_run.json"


def read(path: Path) -> dict[str, Any]:
    """Return a file of tests/golden; {} before there is one."""
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return stored


def changes(before: Any, after: Any, name: str) -> list[str]:
    """Return a line for each difference of two nestings of mappings, lists, texts and numbers; of two lists of numbers,
    one line."""
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [line for key in keys for line in changes(before.get(key), after.get(key), f"{name}: {key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        if isinstance(after[0], float):
            largest, at = max(
                (abs(b - a) / abs(b or 1), at) for at, (b, a) in enumerate(zip(before, after, strict=True))
            )
            return [f"{name}: by up to {largest:.1e} of the value, at [{at}]: {before[at]} -> {after[at]}"]
        rows = enumerate(zip(before, after, strict=True))
        return [line for at, (old, new) in rows for line in changes(old, new, f"{name}[{at}]")]
    return [f"{name}: {before} -> {after}"]


def update(new_run: bool) -> None:
    """Store what the present code does, and print what changed."""
    with tempfile.TemporaryDirectory() as folder:
        computed = {ORDERS: all_orders(), LOSSES: golden_run(Path(folder))}
    lines = []
    for path, now in computed.items():
        lines += changes(read(path), now, path.stem)
        path.write_text(json.dumps(now, indent=1) + "\n")
    if new_run:
        with tempfile.TemporaryDirectory() as folder:
            store_run(STORED_RUN, Path(folder))
        shutil.copy(LOSSES, LOSSES_OF_STORED_RUN)
        lines.append(f"{STORED_RUN.name}: made anew")
    print("\n".join(lines) or "nothing has changed")


if __name__ == "__main__":
    update(new_run="--new-run" in sys.argv[1:])
