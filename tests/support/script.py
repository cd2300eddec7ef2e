"""Runs a script of the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_script(script: str | Path, *args: object) -> str:
    """Run a script, given by its path from the repository's root, and return what it printed."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
