"""megatron_lfr.lfr can be used by itself: it can be imported without PyTorch."""

from __future__ import annotations

import subprocess
import sys


def test_lfr_imports_and_runs_without_torch() -> None:
    program = """
import sys
sys.modules["torch"] = None  # any import of it fails
import numpy as np
from megatron_lfr.lfr import Curriculum, Journal, preset
import pathlib, tempfile
plan = preset("lfr").plan(64, 8, 8, train_epochs=2.5)
with tempfile.TemporaryDirectory() as folder:
    curriculum = Curriculum(plan, Journal(pathlib.Path(folder), {}), seed=1)
    for step, ids in curriculum.steps():
        curriculum.record(step, np.ones(8, np.float32), np.ones(8, np.float32))
print("steps", step + 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "steps 21\n", done.stderr
