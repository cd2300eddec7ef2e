"""Records as a file: .npy for NumPy, .json for everything else."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.fileio import write_atomic


def check_output(path: Path) -> None:
    """ValueError for a file that `write_records` cannot write."""
    if path.suffix not in (".npy", ".json"):
        raise ValueError(f"--output {path}: must end in .npy or .json")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path}: its folder does not exist")


def write_records(path: Path, records: npt.NDArray[np.void]) -> None:
    """A structured array as it is, or as a list of objects; JSON has no NaN: null."""
    if path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, records, allow_pickle=False)
        write_atomic(path, buffer.getvalue())
        return
    assert records.dtype.names is not None
    rows = [dict(zip(records.dtype.names, map(_number, row), strict=True)) for row in records.tolist()]
    write_atomic(path, json.dumps(rows, allow_nan=False) + "\n")


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
