"""Writes records to a file: .npy for NumPy, .json for everything else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.replay import PHASE_MEAN, STEP, VISIT
from megatron_lfr.analysis.spikes import SPIKE
from megatron_lfr.fileio import check_replaces, json_value, write_atomic


def check_output(path: Path) -> None:
    """Check the output file. ValueError where its ending is unknown, or where it exists and holds no such records."""
    if path.suffix not in (".npy", ".json"):
        raise ValueError(f"--output {path}: must end in .npy or .json")
    kinds = [np.empty(0, dtype) for dtype in (VISIT, PHASE_MEAN, STEP, SPIKE)]
    if path.suffix == ".npy":
        begins = [_as_npy(kind).partition(b"'fortran_order'")[0] for kind in kinds]
    else:
        begins = [b"[]", *(f'[{{"{kind.dtype.names[0]}": '.encode() for kind in kinds if kind.dtype.names)]
    check_replaces("--output", path, *begins)


def write_records(path: Path, records: npt.NDArray[np.void]) -> None:
    """Write a structured array as it is (.npy), or as a list of objects with null for NaN (.json)."""
    if path.suffix == ".npy":
        write_atomic(path, _as_npy(records))
        return
    assert records.dtype.names is not None
    rows = [dict(zip(records.dtype.names, row, strict=True)) for row in records.tolist()]
    write_atomic(path, json.dumps(json_value(rows), allow_nan=False) + "\n")


def _as_npy(records: npt.NDArray[np.void]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    return buffer.getvalue()
