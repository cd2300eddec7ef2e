"""Packages that a test compares with, or reads and writes the formats of."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def peer(module: str) -> Any:
    """Import a module. Where it is missing, the test is skipped, but fails under `make test`, which installs all."""
    if os.environ.get("REQUIRE_PEERS"):
        return importlib.import_module(module)
    return pytest.importorskip(module)
