"""Extended runs whose phases use arrays: each segment keeps those that it was begun with, wherever they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr.analysis import open_run
from megatron_lfr.cli import main
from megatron_lfr.data.corpus.block_values import hash_values, write_description
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.run_folder import RunFolder
from support.folder_bytes import folder_bytes
from support.same_run import assert_same_run
from support.tiny_run import STOPPED, tiny_flags

SCHEDULE = (
    "[{kind: learn, duration: 0.5, unit: share}, {kind: focus, duration: 0.5, unit: share, drop: 0.3, score: file:ref}]"
)
RETAINED = ("--save-retain-steps", "4", "6", "12")
MORE = ("--train-iters", "+8", "--replay", "0.25")


@pytest.fixture(scope="module")
def arrays(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an array of the blocks of the first prefix, and another one, with other numbers, of those of both, which
    says of which corpus it is."""
    folder, rng = tmp_path_factory.mktemp("arrays"), np.random.default_rng(5)
    for name, prefixes in (("one", corpus[:1]), ("both", corpus)):
        dataset = BlockDataset(prefixes, 16, "100,0,0")
        np.save(folder / f"{name}.npy", rng.normal(size=dataset.train.num_blocks).astype(np.float32))
    write_description(folder / "both.npy", dataset.digests(), "numbers")
    return folder / "one.npy", folder / "both.npy"


def flags(corpus: list[str], *more: str) -> list[str]:
    length = tiny_flags(corpus)
    at = length.index("--train-epochs")
    constant = ["--lr-decay-style", "constant", "--log-interval", "1", "--save-interval-mins", "None"]
    return [*length[:at], *length[at + 2 :], *constant, "--split", "100,0,0", "--train-iters", "6", *more]


def go_on(run: Path, *more: str) -> int:
    return main(["train", "--config", str(run / "config.yaml"), "--save", str(run), *more])


def extend(run: Path, *words: str) -> int:
    return main(["extend", "--run", str(run), *words])


@pytest.fixture(scope="module")
def begun(corpus: list[str], arrays: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of one prefix to its end, after 6 steps. Not to be written to."""
    run = tmp_path_factory.mktemp("begun") / "run"
    words = flags(corpus[:1], "--lfr-schedule", SCHEDULE, "--lfr-scores", f"ref={arrays[0]}")
    assert main(["train", *words, "--save-retain-steps", "4", "6", "--save", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def extended(
    begun: Path, corpus: list[str], arrays: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train it for 8 steps more, on both prefixes. Not to be written to."""
    run = shutil.copytree(begun, tmp_path_factory.mktemp("extended") / "run")
    assert extend(run, "--data-path", *corpus, *MORE, "--lfr-scores", f"ref={arrays[1]}") == 0
    assert go_on(run, *RETAINED) == 0
    return run


def read(path: Path) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = np.load(path)
    return values


def test_each_segment_has_its_array(begun: Path, extended: Path, arrays: tuple[Path, Path], tmp_path: Path) -> None:
    facts = RunFolder(extended).identity()["segments"]
    assert facts[:1] == RunFolder(begun).identity()["segments"]
    assert [segment["arrays"] for segment in facts] == [{"ref": hash_values(read(path))} for path in arrays]
    old, new = map(read, arrays)
    _, first, _, second = open_run(extended).phases()
    np.testing.assert_array_equal(first.scores[: len(old)], old)
    assert np.isnan(first.scores[len(old) :]).all()
    np.testing.assert_array_equal(second.scores, new)
    for phase, scores in ((first, old), (second, new)):
        easiest = np.argsort(scores, kind="stable")[: int(0.3 * len(scores))]
        assert not np.isin(phase.order, easiest).any()
    assert (second.order >= len(old)).any()
    assert main(["report", str(extended), "--output", str(tmp_path / "page.html")]) == 0
    assert main(["inspect", str(extended), "--step", "13", "--chars", "0"]) == 0


def test_a_run_goes_on_with_both(begun: Path, extended: Path, corpus: list[str], arrays: tuple[Path, Path]) -> None:
    """Whether the command names one array, as that of the last segment, or leaves it to config.yaml."""
    run = shutil.copytree(begun, extended.parent / "stopped")
    assert extend(run, "--data-path", *corpus, *MORE, "--lfr-scores", f"ref={arrays[1]}") == 0
    assert go_on(run, "--exit-interval", "12") == STOPPED
    words = ["--lfr-schedule", SCHEDULE, "--lfr-scores", f"ref={arrays[1]}", "--train-iters", "14", "--replay", "0.25"]
    assert main(["train", *flags(corpus, *words), "--exit-interval", "13", "--save", str(run)]) == STOPPED
    assert go_on(run, "--exit-interval", "None") == 0
    assert_same_run(extended, run)


def test_branches_of_each_segment(
    begun: Path, extended: Path, corpus: list[str], arrays: tuple[Path, Path], tmp_path: Path
) -> None:
    before = folder_bytes(extended)
    for step, segments in ((4, 1), (6, 2), (12, 2)):
        save = tmp_path / str(step)
        words = ["--at-step", str(step), "--lr-schedule", "inherit", "--save", str(save)]
        assert main(["branch", "--from", str(extended), *words]) == 0
        if segments == 1:
            assert RunFolder(save).recorded_settings["lfr_scores"] == [f"ref={arrays[0]}"]
            assert extend(save, "--data-path", *corpus, *MORE, "--lfr-scores", f"ref={arrays[1]}") == 0
        assert go_on(save) == 0
        assert_same_run(extended, save)
    # Other phases in the last segment, by another array: what was trained before keeps its own.
    other = tmp_path / "other.npy"
    np.save(other, -read(arrays[1]))
    words = ["--at-step", "6", "--lr-schedule", "inherit", "--save", str(tmp_path / "arm"), "--lfr-schedule", SCHEDULE]
    assert main(["branch", "--from", str(extended), *words, "--lfr-scores", f"ref={other}"]) == 0
    assert go_on(tmp_path / "arm") == 0
    facts = [segment["arrays"]["ref"] for segment in RunFolder(tmp_path / "arm").identity()["segments"]]
    assert facts == [hash_values(read(path)) for path in (arrays[0], other)]
    # A branch that ends before the extension has nothing of it.
    words = ["--at-step", "4", "--lr-schedule", "inherit", "--train-iters", "6", "--save", str(tmp_path / "short")]
    assert main(["branch", "--from", str(extended), *words]) == 0
    assert go_on(tmp_path / "short") == 0
    assert_same_run(begun, tmp_path / "short")
    assert folder_bytes(extended) == before


def test_files_that_moved(
    begun: Path,
    corpus: list[str],
    arrays: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Relative paths lead from the folder in which they were given; a moved file is found by its numbers."""
    for name, path in zip(("old.npy", "new.npy"), arrays, strict=True):
        shutil.copy(path, tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    words = flags(corpus[:1], "--lfr-schedule", SCHEDULE, "--lfr-scores", "ref=old.npy")
    assert main(["train", *words, "--save", "run"]) == 0
    monkeypatch.chdir("elsewhere")
    run = Path("../run")
    assert extend(run, "--data-path", *corpus, *MORE, "--lfr-scores", "ref=../new.npy") == 0
    assert go_on(run, "--exit-interval", "12") == STOPPED
    monkeypatch.chdir("/")
    run = tmp_path / "run"
    assert main(["inspect", str(run), "--step", "1", "--chars", "0"]) == 0
    Path(tmp_path / "old.npy").rename(tmp_path / "moved.npy")
    capsys.readouterr()
    assert main(["inspect", str(run), "--step", "1", "--chars", "0"]) == 2
    assert "old.npy" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert go_on(run, "--exit-interval", "None") == 2
    assert "old.npy" in capsys.readouterr().err
    both = [word for name in ("moved.npy", "new.npy") for word in ("--lfr-scores", f"ref={tmp_path / name}")]
    assert go_on(run, "--exit-interval", "None", *both) == 0
    monkeypatch.chdir("/")
    assert main(["inspect", str(run), "--step", "1", "--chars", "0"]) == 0
    np.save(tmp_path / "moved.npy", read(arrays[0]) + 1)
    capsys.readouterr()
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 2
    assert "moved.npy (other numbers)" in capsys.readouterr().err


def test_an_array_that_does_not_fit_is_refused(
    begun: Path, corpus: list[str], arrays: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(begun, tmp_path / "run")
    before = folder_bytes(run)

    def refused(*words: str) -> str:
        capsys.readouterr()
        assert extend(run, *words) == 2
        assert {name: content for name, content in folder_bytes(run).items() if name != "lock"} == {
            name: content for name, content in before.items() if name != "lock"
        }
        return capsys.readouterr().err

    grown = ("--data-path", *corpus, *MORE)
    assert "--lfr-scores: phase 3: array ref: has the shape" in refused(*grown)  # that of the segment before
    both = ("--lfr-scores", f"ref={arrays[1]}")
    assert "both.npy: was made of 2 prefixes, the corpus has 1" in refused(*MORE[:2], *both)
    assert "none.npy: No such file" in refused(*grown, "--lfr-scores", f"ref={tmp_path / 'none.npy'}")
    assert "--lfr-scores both.npy: expected NAME=FILE.npy" in refused(*grown, "--lfr-scores", "both.npy")
    # Without new blocks, the array goes on, or gives way to another one.
    assert extend(run, "--train-iters", "+4") == 0
    other = tmp_path / "other.npy"
    np.save(other, -read(arrays[0]))
    assert extend(run, "--train-iters", "+4", "--lfr-scores", f"ref={other}") == 0
    assert go_on(run) == 0
    facts = [segment["arrays"]["ref"] for segment in RunFolder(run).identity()["segments"]]
    assert facts == [hash_values(read(path)) for path in (arrays[0], arrays[0], other)]
