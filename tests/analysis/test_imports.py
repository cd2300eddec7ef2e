"""The curriculum and all that looks back at runs need no PyTorch."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
sys.modules["torch"] = None  # any import of it fails
for name in ("lfr", "analysis", "report", "inspection"):
    package = importlib.import_module(f"megatron_lfr.{name}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_all_modules_import_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"megatron_lfr.lfr.curriculum", "megatron_lfr.inspection.views"} <= set(done.stdout.split())
