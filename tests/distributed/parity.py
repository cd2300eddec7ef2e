"""The module tools/parity_matrix.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
matrix: ModuleType = importlib.import_module("parity_matrix")
