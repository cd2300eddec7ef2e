"""The analysis of runs needs no PyTorch, and the curriculum does not import it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, pkgutil, sys
sys.modules["torch"] = None  # any import of it fails
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(*sorted({name.split(".")[1] for name in sys.modules if name.startswith("megatron_lfr.")}))
"""


@pytest.mark.parametrize(
    ("package", "above"),
    [
        ("megatron_lfr.lfr", {"analysis", "run_folder", "report", "inspection", "training", "engine"}),
        ("megatron_lfr.analysis", {"report", "inspection", "training", "engine"}),
        ("megatron_lfr.report", {"inspection", "training", "engine"}),
        ("megatron_lfr.inspection", {"report", "training", "engine"}),
    ],
)
def test_all_modules_import_without_torch_and_nothing_from_above(package: str, above: set[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, package], capture_output=True, text=True, check=False)
    used = set(done.stdout.split())
    assert package.split(".")[1] in used, done.stderr
    assert not used & above
