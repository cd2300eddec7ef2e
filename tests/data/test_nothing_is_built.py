"""Opening a corpus and making an order leave nothing behind, start no process, and take no memory for documents."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from support.waiting import LIMIT

ROOT = Path(__file__).parents[2]
WATCH = """
import sys

def watch(event, arguments):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "os.system"):
        raise AssertionError(f"a process is started: {event} {arguments}")

sys.addaudithook(watch)
sys.path.insert(0, "tools")
from pathlib import Path
import numpy as np
from process_memory import peak_beyond
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.lfr import Curriculum, Journal, preset

prefix, journal = map(Path, sys.argv[1:])
found = []
print(peak_beyond(lambda: found.append(BlockDataset([prefix], 64, "99,1,0"))))
plan = preset("uniform").plan(found[0].train.num_blocks, 64, 8, train_epochs=1.0)
curriculum = Curriculum(plan, Journal(journal, {}), seed=1)
step, ids = next(curriculum.steps())
print(found[0].train.read(ids).sum())
"""


@pytest.fixture(scope="module")
def many_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two million documents of four tokens each: an .idx of 40 MB."""
    prefix = tmp_path_factory.mktemp("many") / "many_text_document"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.ones(8_000_000, np.uint16), np.full(2_000_000, 4))
    return prefix


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {str(path): path.stat() for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def test_no_index_is_built_and_no_compiler_is_run(many_documents: Path, tmp_path: Path) -> None:
    before = listing(many_documents.parent), listing(ROOT / "megatron_lfr"), listing(ROOT / "csrc")
    environment = {**os.environ, "PATH": "/nowhere", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WATCH, str(many_documents), str(tmp_path / "journal")]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert ended.returncode == 0, ended.stderr
    memory, tokens = map(int, ended.stdout.split())
    assert tokens == 8 * 65
    assert memory < 12_000_000  # of the 40 MB, what the check passes by at a time
    assert before == (listing(many_documents.parent), listing(ROOT / "megatron_lfr"), listing(ROOT / "csrc"))
