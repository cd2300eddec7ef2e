"""Reading JSON objects, which nothing vouches for: what is missing or of another type is an error that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; ValueError names the file and says what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__} instead of an object")
    return value


def integer(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Read a positive integer; ValueError names the key where there is none, and no default."""
    value = settings.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{key} is {value!r}; expected a positive integer below 2^31")
    return value


def number(settings: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Read a positive number, as `integer` does."""
    value = settings.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}; expected a positive, finite number")
    return float(value)


def flag(settings: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Read true or false; ValueError names the key for anything else."""
    value = settings.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return value
