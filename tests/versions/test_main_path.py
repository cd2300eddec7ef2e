"""A main path and its versions: their bits, their steps, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.analysis.overview import view_run
from megatron_lfr.analysis.rates import rates
from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.cli import main
from megatron_lfr.run_folder import RunFolder
from support.folder_bytes import folder_bytes
from support.run_process import Run
from support.same_run import assert_same_last_checkpoint, assert_same_run, metrics_without_time
from support.tiny_run import tiny_flags

T, N = 10, 4
"""Steps of a version, and versions; of which 6 are a branch's."""


def flags(corpus: list[str], *more: str) -> list[str]:
    given = tiny_flags(corpus)
    at = given.index("--train-epochs")
    return [
        *given[:at],
        *given[at + 2 :],
        *("--lfr-schedule", "uniform", "--log-interval", "1", "--save-interval-mins", "None"),
        *("--lr-warmup-iters", "3", "--eval-iters", "1", *more),
    ]


def main_path_flags(corpus: list[str], *more: str) -> list[str]:
    plan = ["--train-iters", str(N * T), "--versions", str(N), "--branch-share", "0.6"]
    return flags(corpus, "--lr-decay-style", "constant", *plan, *more)


@pytest.fixture(scope="module")
def path(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a main path. Not to be written to."""
    folder = tmp_path_factory.mktemp("path") / "main"
    assert main(["train", *main_path_flags(corpus), "--save", str(folder)]) == 0
    return folder


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in metrics_without_time(folder) if row["event"] == "train"]


def losses(folder: Path) -> bytes:
    return b"".join(np.load(phase).tobytes() for phase in sorted((folder / "journal").glob("phase_*.npy")))


def test_a_main_path_keeps_its_branch_points_and_ends_at_the_last(path: Path) -> None:
    assert CheckpointStore(path / "checkpoints", keep=None).iterations() == [4, 14, 24, 34]
    assert steps_of(path)[-1] == 34
    assert metrics_without_time(path)[-1]["event"] == "evaluation"


def test_the_versions(corpus: list[str], path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has the bits of one run that warms up, is stable and decays; the steps trained by all add up; and the main
    path has the bits of one that nothing left."""
    before, trained = folder_bytes(path), len(steps_of(path))
    for version in range(1, N + 1):
        save, end, leaves = tmp_path / f"v{version}", version * T, version * T - 6
        how = ["--lr-decay-style", "cosine", "--min-lr", "1e-4"]
        assert main(["branch", "--from", str(path), "--version", str(version), "--save", str(save), *how]) == 0
        said = capsys.readouterr().out
        assert f"version {version}, a branch of {path} from step {leaves} of {end} on" in said
        assert f"learning rate: {1e-4 + 0.0099 * (0.5 + np.cos(np.pi / 6) / 2):g} at its first step, 0.0001 at" in said
        assert json.loads((save / "run.json").read_text())["parent"]["version"] == version
        ahead = rates(view_run(save, "", 0.1))
        assert ahead.planned_steps.tolist() == list(range(leaves + 1, end + 1))
        assert main(["train", "--config", str(save / "config.yaml")]) == 0
        assert steps_of(save) == list(range(1, end + 1))
        done = rates(view_run(save, "", 0.1))
        assert not len(done.planned_steps)
        assert done.trained.tolist() == [*ahead.trained.tolist(), *ahead.planned.tolist()]
        trained += len(steps_of(save)) - leaves

        wsd = ["--lr-decay-style", "WSD", "--lr-wsd-decay-style", "cosine", "--lr-wsd-decay-iters", "6"]
        one = tmp_path / f"one{version}"
        length = ["--train-iters", str(end), "--min-lr", "1e-4"]
        assert main(["train", *flags(corpus, *wsd, *length), "--save", str(one)]) == 0
        if version < N:
            assert_same_run(one, save)
        else:  # the main path was evaluated where the last version leaves
            rows = [row for row in metrics_without_time(save) if (row["event"], row["step"]) != ("evaluation", leaves)]
            assert rows == metrics_without_time(one)
            assert losses(save) == losses(one)
            assert_same_last_checkpoint(one, save)
    page = tmp_path / "report.html"
    assert main(["report", str(path), *(str(tmp_path / f"v{i}") for i in (1, 2, 3, 4)), "--output", str(page)]) == 0
    assert_shows_versions(page.read_text(), path, tmp_path)
    assert trained == N * T + 6 * (N - 1) == 58
    assert sum(version * T for version in range(1, N + 1)) == 100
    assert folder_bytes(path) == before
    assert main(["train", *main_path_flags(corpus), "--save", str(tmp_path / "alone")]) == 0
    assert_same_run(path, tmp_path / "alone")


def assert_shows_versions(page: str, path: Path, branches: Path) -> None:
    """Look for a row of each version, with where it leaves and its last losses, and for a line of each run's rate."""
    (section,) = re.findall(r'<section id="versions">.*?</section>', page, re.DOTALL)
    assert section.count('class="series') == 1 + N
    for version in range(1, N + 1):
        assert f"step {version * T - 6} of {path}" in section
        last = [row for row in metrics_without_time(branches / f"v{version}") if row["event"] == "evaluation"][-1]
        assert all(f"{loss:.4f}" in section for loss in (last["loss"], *last["domains"].values()))
    assert f"Version 3, a branch of {path} from step 24 on." in page


def test_a_branch_that_is_killed_goes_on(path: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a branch, after its first checkpoint of its own: the main path stays as it is."""
    before = folder_bytes(path)
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    for save in (killed, alone):
        how = ["--version", "2", "--lr-decay-style", "linear"]
        assert main(["branch", "--from", str(path), *how, "--save", str(save)]) == 0
    given = shutil.copy(killed / "config.yaml", tmp_path / "given.yaml")
    train = ["--config", str(given), "--save-interval", "2"]
    code, said = Run([*train, "--callback", "support.own_callbacks:KilledAfterStep17"]).end()
    assert code == -signal.SIGKILL, said
    assert CheckpointStore(killed / "checkpoints", keep=None).iterations() == [14, 16]
    assert folder_bytes(path) == before
    assert main(["train", *train]) == 0
    assert main(["train", "--config", str(alone / "config.yaml")]) == 0
    assert_same_run(alone, killed)
    assert folder_bytes(path) == before


def test_the_order_of_every_focus_is_that_of_one_run(corpus: list[str], tmp_path: Path) -> None:
    """One version with phases in shares, which all of a version's runs have over the same steps."""
    focus = "{kind: focus, duration: 0.15, unit: share, drop: 0.5}, {kind: review, duration: 0.15, unit: share}"
    phases = f"[{{kind: learn, duration: 0.4, unit: share}}, {focus}, {focus}]"
    lfr = [*flags(corpus, "--lfr-schedule", phases, "--train-iters", "30", "--min-lr", "1e-4")]
    trunk, save, one = tmp_path / "main", tmp_path / "v1", tmp_path / "one"
    versions = ["--lr-decay-style", "constant", "--versions", "1", "--branch-share", "0.7"]
    assert main(["train", *lfr, *versions, "--save", str(trunk)]) == 0
    how = ["--version", "1", "--lr-decay-style", "minus_sqrt"]
    assert main(["branch", "--from", str(trunk), *how, "--save", str(save)]) == 0
    assert main(["train", "--config", str(save / "config.yaml")]) == 0
    wsd = ["--lr-decay-style", "WSD", "--lr-wsd-decay-style", "minus_sqrt", "--lr-wsd-decay-iters", "21"]
    assert main(["train", *lfr, *wsd, "--save", str(one)]) == 0
    orders = [
        [row["order_hash"] for row in metrics_without_time(run) if row["event"] == "phase"] for run in (one, save)
    ]
    assert orders[0] == orders[1]
    kinds = [row["kind"] for row in metrics_without_time(save) if row["event"] == "phase"]
    assert kinds == ["learn", "focus", "review", "focus", "review"]
    assert losses(one) == losses(save)
    assert_same_last_checkpoint(one, save)


def test_a_finished_main_path_says_so_and_where_versions_leave(
    corpus: list[str], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["train", *main_path_flags(corpus), "--save", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"{path} is finished at step 34" in said
    assert f"{path}: versions 1 to 4 leave after steps 4, 14, 24, 34 and end after 10, 20, 30, 40" in said
    assert steps_of(path)[-1] == 34


def test_segments_are_versions(corpus: list[str], tmp_path: Path) -> None:
    """A corpus that grows: the second version has the bits, and the orders of its Focus phases, of one run over the
    same segments that warms up, is stable and decays."""
    trunk, save, one = tmp_path / "main", tmp_path / "v2", tmp_path / "one"

    def two_segments(folder: Path, *rate: str) -> None:
        words = [*flags(corpus, "--train-iters", "10", *rate), "--save", str(folder)]
        words[words.index("--data-path") + 2 : words.index("--data-path") + 3] = []  # the first prefix alone
        assert main(["train", *words]) == 0
        more = ["--data-path", *corpus, "--train-iters", "+15", "--lfr-schedule", "lfr"]
        assert main(["extend", "--run", str(folder), *more]) == 0
        assert main(["train", "--config", str(folder / "config.yaml")]) == 0

    two_segments(trunk, "--lr-decay-style", "constant", "--branch-share", "0.6", "--keep-last", "1")
    assert CheckpointStore(trunk / "checkpoints", keep=None).iterations() == [4, 16, 25]
    before = folder_bytes(trunk)
    how = ["--version", "2", "--lr-decay-style", "linear"]
    assert main(["branch", "--from", str(trunk), *how, "--save", str(save)]) == 0
    assert main(["train", "--config", str(save / "config.yaml")]) == 0
    wsd = ["--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear", "--lr-wsd-decay-iters", "9"]
    two_segments(one, *wsd, "--lr-decay-iters", "25")
    orders = [
        [row["order_hash"] for row in metrics_without_time(run) if row["event"] == "phase"] for run in (one, save)
    ]
    assert orders[0] == orders[1]
    assert len(orders[0]) == 6
    assert losses(one) == losses(save)
    assert_same_last_checkpoint(one, save)
    assert folder_bytes(trunk) == before
    first = tmp_path / "v1"
    assert (
        main(["branch", "--from", str(trunk), "--version", "1", "--lr-decay-style", "linear", "--save", str(first)])
        == 0
    )
    assert RunFolder(first).plan()[0].total_steps == 10


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(list(command)) == 2
    return capsys.readouterr().err


def test_versions_that_cannot_be_are_refused(
    corpus: list[str], path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["--save", str(tmp_path / "run")]

    def train(*more: str) -> str:
        return refused(capsys, "train", *main_path_flags(corpus, *more), *new)

    assert "--versions 4: give --branch-share too" in refused(
        capsys, "train", *flags(corpus, "--train-iters", "40", "--versions", "4"), *new
    )
    assert "--versions 3: must divide the run's 40 steps" in train("--versions", "3")
    assert "--branch-share 0.01: of a version's 10 steps, a branch would have 0" in train("--branch-share", "0.01")
    assert "--branch-share 1.5: must lie between 0 and 1" in train("--branch-share", "1.5")
    assert "after step 4, where the learning rate has decayed to" in train("--lr-decay-style", "cosine")
    assert "after step 4, where the learning rate still warms up" in train("--lr-warmup-iters", "5")
    part = "[{kind: learn, duration: 1, unit: share, scope: [easy], replay: 0.2}]"
    for schedule in ("lfr", "[{kind: learn, duration: 40, unit: steps}]", part):
        assert "give --lfr-schedule uniform" in train("--lfr-schedule", schedule)
    assert not (tmp_path / "run").exists()

    def branch(*more: str) -> str:
        return refused(capsys, "branch", "--from", str(path), *new, "--lr-schedule", "inherit", *more)

    assert "--version 5: the main path has versions 1 to 4" in branch("--version", "5")
    assert "either --at-step or --version" in branch("--version", "1", "--at-step", "4")
    assert (
        f"--version 2, which leaves after step 15: {path} has no checkpoint of that step; there are: 4, 14,"
        in branch("--version", "2", "--branch-share", "0.5")
    )
    assert "--train-iters 13: must be at least 14" in branch("--version", "2", "--train-iters", "13")
    assert not (tmp_path / "run").exists()
