"""The kernels as compiled for Ampere to Blackwell, without a GPU: registers and spills, against triton_record.json.

To renew the record of the installed Triton version after a change that is worth its registers:

    PYTHONPATH=.:tests python -m support.compile_kernels --record
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

RECORD = Path(__file__).with_name("triton_record.json")
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""Shared memory that a block may have."""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    """Compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "support.compile_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    kernels: dict[str, dict[str, int]] = json.loads(done.stdout)
    return kernels


def test_nothing_spills(compiled: dict[str, dict[str, int]]) -> None:
    assert {name.split()[0] for name in compiled} == SHARED_KIB.keys()
    assert {name: numbers["spills"] for name, numbers in compiled.items() if numbers["spills"]} == {}


def test_tiles_fit_into_shared_memory(compiled: dict[str, dict[str, int]]) -> None:
    shared = {name: numbers["shared"] / 1024 for name, numbers in compiled.items()}
    assert {name: kib for name, kib in shared.items() if kib > SHARED_KIB[name.split()[0]]} == {}


def test_no_more_registers_than_recorded(compiled: dict[str, dict[str, int]]) -> None:
    records = json.loads(RECORD.read_text())
    if triton.__version__ not in records:
        pytest.skip(f"no record for Triton {triton.__version__}, only for {', '.join(records)}")
    record = records[triton.__version__]
    assert set(record) == set(compiled)
    worse = {name: (n["registers"], record[name]) for name, n in compiled.items() if n["registers"] > record[name]}
    assert worse == {}, "registers now and in the record"
