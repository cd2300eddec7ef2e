"""A small corpus on disk, and the command line of a run that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.stopped_run import trained
from support.tiny_corpus import corpus
from support.tiny_run import tiny_flags

__all__ = ["corpus", "tiny_args", "trained"]


@pytest.fixture
def tiny_args(corpus: list[str], tmp_path: Path) -> list[str]:
    """Return the flags of a tiny run over `corpus`, into tmp_path/run."""
    return [*tiny_flags(corpus), "--save", str(tmp_path / "run")]
