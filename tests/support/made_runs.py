"""Small runs with real journals, made without training."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from megatron_lfr.lfr import Phase, Schedule
from megatron_lfr.lfr.phase import Unseen

TOOL = Path(__file__).parents[2] / "tools" / "synthetic_run.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic_run", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    """tools/synthetic_run.py."""
    return load_tool()


@pytest.fixture(scope="session")
def made_run(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished `lfr` run over about 4,000 blocks. Not to be written to."""
    folder: Path = tool.make_run(tmp_path_factory.mktemp("lfr"), 4000, epochs=5.0, batch=128)
    return folder


@pytest.fixture
def run_folder(made_run: Path, tmp_path: Path) -> Path:
    """Return a copy of it (its corpus stays where it is)."""
    return Path(shutil.copytree(made_run, tmp_path / "mine"))


@pytest.fixture(scope="session")
def uniform_run(tool: ModuleType, made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run over the same corpus without Focus. Not to be written to."""
    folder: Path = tool.make_run(tmp_path_factory.mktemp("uniform"), 4000, "uniform", epochs=4.0, batch=128)
    return folder


@pytest.fixture(scope="session")
def hurried_runs(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs whose Focus comes before all blocks were seen: one keeps the unseen, one leaves them out."""
    return [
        tool.make_run(tmp_path_factory.mktemp(unseen), 4000, schedule_with(unseen), epochs=1.0, batch=128)
        for unseen in ("keep", "exclude")
    ]


def schedule_with(unseen: Unseen) -> Schedule:
    """Learn a part, focus, review."""
    focus = Phase("focus", 0.2, "share", drop=0.4, unseen=unseen)
    return Schedule((Phase("learn", 0.5, "share"), focus, Phase("review", 0.3, "share")))
