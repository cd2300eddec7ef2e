"""The scalars and the curriculum's state in a checkpoint, as JSON: what is written reads back equal, or is refused with
its name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATE_FILE = "state.json"


def dump_state(state: Mapping[str, Any]) -> str:
    """Return `state` as JSON text; ValueError names the first entry that JSON cannot hold."""
    _check(dict(state), "state")
    return json.dumps(dict(state), indent=1, allow_nan=False)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state in a checkpoint's folder; ValueError says what is wrong with it."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"not readable ({error!r})") from error
    if not isinstance(state, dict):
        raise ValueError(f"holds a {type(state).__name__} instead of an object")
    return state


def _check(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):  # JSON would silently turn it into a string
                raise ValueError(f"{where}: the key {key!r} is a {type(key).__name__}; JSON has strings only")
            _check(entry, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for position, entry in enumerate(value):
            _check(entry, f"{where}[{position}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; JSON has finite numbers only")
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(
            f"{where} is a {type(value).__name__}; a checkpoint's state holds numbers, strings, booleans, None, "
            "and lists and dicts of them. Tensors belong with the tensors"
        )
