"""The journal's files, read back with NumPy alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.lfr import Journal


def test_phase_files_are_plain_npy_at_every_sync(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", {"corpus": "a"})
    journal.begin_phase(0)
    for count in (3, 4):
        journal.append(np.arange(count, dtype=np.float32))
        journal.sync()
    journal.append(np.float32([9]))  # not synced: readers see whole entries only
    entries = np.load(tmp_path / "journal/phase_000.npy", allow_pickle=False)
    assert entries.dtype == np.float32
    assert entries.tolist() == [0, 1, 2, 0, 1, 2, 3]
    left = journal.reader().read(0)  # what a kill would leave, and `inspect` sees
    assert left is not None
    assert left[-1] == 9
    journal.begin_phase(1)
    assert np.load(tmp_path / "journal/phase_000.npy")[-1] == 9
    assert np.load(tmp_path / "journal/phase_001.npy").shape == (0,)


def test_rewind_cuts_back_and_removes_later_phases(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    for phase in range(3):
        journal.begin_phase(phase)
        journal.append(np.full(5, phase, np.float32))
    np.save(journal.scores_path(1), np.zeros(2, np.float32))
    np.save(journal.scores_path(2), np.zeros(2, np.float32))
    journal.rewind(0, 2)
    assert sorted(path.name for path in tmp_path.glob("phase_*")) == ["phase_000.npy", "phase_001.scores.npy"]
    journal.append(np.float32([7]))
    assert journal.read(0).tolist() == [0, 0, 7]
    assert (journal.phase, journal.count) == (0, 3)


def test_phases_from_1000_on_are_told_apart(tmp_path: Path) -> None:
    for phase in (0, 1, 99, 100, 101, 999, 1000, 1001, 1002, 10010):
        (tmp_path / f"phase_{phase:03d}.npy").write_bytes(b"")
    journal = Journal(tmp_path, {})
    for last, left in ((1000, {0, 1, 99, 100, 101, 999, 1000}), (100, {0, 1, 99, 100}), (-1, set())):
        journal.rewind(last, 0)
        assert {int(path.stem.removeprefix("phase_")) for path in tmp_path.glob("phase_*")} == left


def test_rewind_past_the_end_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    journal.begin_phase(0)
    journal.append(np.zeros(5, np.float32))
    with pytest.raises(ValueError, match=r"phase_000\.npy: holds 5 entries, but the checkpoint needs 6"):
        journal.rewind(0, 6)


def test_a_journal_of_another_corpus_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, {"corpus": "aaaa", "seed": 1})
    Journal(tmp_path, {"corpus": "aaaa", "seed": 1})
    with pytest.raises(ValueError, match=r'its corpus is "aaaa", here it is "bbbb"'):
        Journal(tmp_path, {"corpus": "bbbb", "seed": 1})


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_meta_file_is_named(tmp_path: Path, content: str) -> None:
    Journal(tmp_path, {})
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta\.json"):
        Journal(tmp_path, {})


def test_identity_is_stored_as_json(tmp_path: Path) -> None:
    Journal(tmp_path, {"schedule": [{"kind": "learn"}], "draws": (1, 2)})
    assert json.loads((tmp_path / "meta.json").read_text()) == {
        "schedule": [{"kind": "learn"}],
        "draws": [1, 2],
    }


def test_phases_follow_one_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="phase 1 cannot follow phase -1"):
        Journal(tmp_path, {}).begin_phase(1)
