"""Branches with other phases than their parent's: the bits of a run that had them from its beginning, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.cli import main
from megatron_lfr.run_folder import RunFolder
from support.folder_bytes import folder_bytes
from support.same_run import assert_same_last_checkpoint, assert_same_run, metrics_without_time
from support.tiny_run import tiny_flags

STEPS, LEARNED = 20, 8
"""Steps of a run, and of a Learn of 40 %."""
INHERIT = ("--lr-schedule", "inherit")
TAILS = (
    "[{kind: learn, duration: 0.4, unit: share}, {kind: focus, duration: 0.3, unit: share, drop: 0.3, "
    "drop_hardest: 0.2, score: excess:ref}, {kind: review, duration: 0.3, unit: share}]"
)
RESCORED = (
    "[{kind: learn, duration: 8, unit: steps}, {kind: focus, duration: 5, unit: steps, drop: 0.5, score: rescored}, "
    "{kind: review, duration: 9, unit: steps}]"
)


def flags(corpus: list[str], *more: str) -> list[str]:
    length = tiny_flags(corpus)
    at = length.index("--train-epochs")
    logs = ["--log-interval", "1", "--save-interval-mins", "None", "--lr-decay-style", "constant"]
    large = ["--global-batch-size", "24"]  # so that Learn is an epoch, after which a preset has its Focus
    return [*length[:at], *length[at + 2 :], *large, *logs, *more]


def train(save: Path, *words: str) -> Path:
    assert main(["train", *words, "--save", str(save)]) == 0
    return save


def fork(source: Path, save: Path, step: int, *how: str) -> int:
    return main(["branch", "--from", str(source), "--at-step", str(step), "--save", str(save), *(how or INHERIT)])


@pytest.fixture(scope="module")
def uniform(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of one Learn, with a cosine. Not to be written to."""
    words = flags(corpus, "--lfr-schedule", "uniform", "--lr-decay-style", "cosine", "--train-iters", str(STEPS))
    return train(tmp_path_factory.mktemp("uniform") / "run", *words, "--save-retain-steps", str(LEARNED), "10")


@pytest.fixture(scope="module")
def lfr(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of five phases, with a cosine, which keeps the ends of Learn and of Focus. Not to be written to."""
    words = flags(corpus, "--lfr-schedule", "lfr", "--lr-decay-style", "cosine", "--train-iters", str(STEPS))
    return train(tmp_path_factory.mktemp("lfr") / "run", *words, "--save-retain-steps", str(LEARNED), "10", "11")


@pytest.fixture(scope="module")
def reference(uniform: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    blocks = RunFolder(uniform).plan()[0].n_blocks
    path = tmp_path_factory.mktemp("reference") / "ref.npy"
    np.save(path, np.random.default_rng(5).normal(4, 1, blocks).astype(np.float32))
    return f"ref={path}"


def test_arms_fork_from_one_beginning(
    uniform: Path, lfr: Path, reference: str, corpus: list[str], tmp_path: Path
) -> None:
    before = folder_bytes(uniform)
    assert fork(uniform, tmp_path / "lfr", LEARNED, *INHERIT, "--lfr-schedule", "lfr") == 0
    assert main(["train", "--config", str(tmp_path / "lfr" / "config.yaml")]) == 0
    assert_same_run(lfr, tmp_path / "lfr")

    cosine = ["--lr-decay-style", "cosine", "--train-iters", str(STEPS)]
    words = flags(corpus, *cosine, "--lfr-schedule", TAILS, "--lfr-scores", reference)
    one = train(tmp_path / "one", *words)
    how = ("--lfr-schedule", TAILS, "--lfr-scores", reference)
    assert fork(uniform, tmp_path / "tails", LEARNED, *INHERIT, *how) == 0
    assert_same_run(one, train(tmp_path / "tails", *words))
    # A parent whose arrays are used goes on with them, and phases that they made are a beginning like any other.
    words = flags(corpus, *cosine, "--lfr-schedule", TAILS, "--lfr-scores", reference, "--save-retain-steps", "14")
    parent = train(tmp_path / "parent", *words)
    assert fork(parent, tmp_path / "inherits", 14) == 0
    assert main(["train", "--config", str(tmp_path / "inherits" / "config.yaml")]) == 0
    assert_same_run(one, tmp_path / "inherits")
    learns = TAILS.replace("review", "learn")
    assert fork(parent, tmp_path / "learns", 14, *INHERIT, "--lfr-schedule", learns) == 0
    assert RunFolder(tmp_path / "learns").identity()["segments"][0]["arrays"].keys() == {"ref"}
    assert folder_bytes(uniform) == before


def test_a_fork_after_a_focus(lfr: Path, uniform: Path, corpus: list[str], tmp_path: Path) -> None:
    assert fork(lfr, tmp_path / "fork", 11, *INHERIT, "--lfr-schedule", "focus-only") == 0
    words = flags(corpus, "--lr-decay-style", "cosine", "--train-iters", str(STEPS), "--lfr-schedule", "focus-only")
    assert_same_run(train(tmp_path / "one", *words), train(tmp_path / "fork", *words))
    # Back to one Learn, which goes on where the parent had ended it.
    assert fork(lfr, tmp_path / "uniform", LEARNED, *INHERIT, "--lfr-schedule", "uniform") == 0
    assert main(["train", "--config", str(tmp_path / "uniform" / "config.yaml")]) == 0
    assert (tmp_path / "uniform" / "journal" / "phase_000.npy").read_bytes() == (
        uniform / "journal" / "phase_000.npy"
    ).read_bytes()
    assert_same_last_checkpoint(tmp_path / "uniform", uniform)


def test_a_schedule_in_steps_has_a_length_of_its_own(corpus: list[str], tmp_path: Path) -> None:
    words = flags(corpus, "--lfr-schedule", "uniform", "--train-iters", str(STEPS), "--split", "100,0,0")
    parent = train(tmp_path / "parent", *words, "--save-retain-steps", str(LEARNED))
    assert fork(parent, tmp_path / "fork", LEARNED, *INHERIT, "--lfr-schedule", RESCORED) == 0
    words_of_steps = flags(corpus, "--lfr-schedule", RESCORED, "--split", "100,0,0")
    one = train(tmp_path / "one", *words_of_steps)
    assert_same_run(one, train(tmp_path / "fork", *words_of_steps))
    assert metrics_without_time(one)[-1]["step"] == 22
    # Scores that were made by the weights of the cut are not made again; those of later weights are not taken.
    longer = RESCORED.replace("duration: 8", "duration: 10").replace("duration: 9", "duration: 7")
    for name, schedule, has_scores in (("same", RESCORED, True), ("longer", longer, False)):  # step 8 is kept for them
        assert fork(one, tmp_path / name, LEARNED, *INHERIT, "--lfr-schedule", schedule) == 0
        assert (tmp_path / name / "journal" / "phase_001.scores.npy").exists() == has_scores
    # Nor are those that were made in another way.
    called = RESCORED.replace("score: rescored", "score: call:support.score_functions:by_block_id")
    assert fork(one, tmp_path / "called", LEARNED, *INHERIT, "--lfr-schedule", called) == 0
    words_of_call = flags(corpus, "--lfr-schedule", called, "--split", "100,0,0")
    assert_same_run(train(tmp_path / "called_alone", *words_of_call), train(tmp_path / "called", *words_of_call))


def test_other_data_and_segments(corpus: list[str], tmp_path: Path) -> None:
    easy, both = corpus[:1], ["--data-path", *corpus]
    words = flags(easy, "--lfr-schedule", "uniform", "--save-retain-steps", str(LEARNED), "--split", "100,0,0")
    new = ["--train-iters", "+12", "--lfr-schedule", TAILS.replace("excess:ref", "detrended")]

    def go_on(run: Path, *more: str) -> Path:
        return train(run, "--config", str(run / "config.yaml"), *more)

    one = train(tmp_path / "one", *words, "--train-iters", str(LEARNED))
    assert main(["extend", "--run", str(one), *both, *new]) == 0
    go_on(one)
    # A branch that ends where it begins, with the data and the phases of an extension.
    long = train(tmp_path / "long", *words, "--train-iters", str(STEPS))
    assert fork(long, tmp_path / "fork", LEARNED, *INHERIT, "--train-iters", str(LEARNED)) == 0
    assert main(["extend", "--run", str(tmp_path / "fork"), *both, *new]) == 0
    assert_same_run(one, go_on(tmp_path / "fork"))
    # A fork within a segment: its phases are those of the segment, and what comes before is frozen.
    two = train(tmp_path / "two", *words, "--train-iters", str(LEARNED))
    assert main(["extend", "--run", str(two), *both, *new[:2], "--lfr-schedule", "learn-only"]) == 0
    go_on(two, "--save-retain-steps", str(LEARNED), "13")
    assert fork(two, tmp_path / "arm", 13, *INHERIT, *new[2:]) == 0
    assert_same_run(one, go_on(tmp_path / "arm"))


def test_what_is_trained_must_be_what_the_schedule_begins_with(
    uniform: Path, lfr: Path, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = folder_bytes(lfr)

    def refused(source: Path, step: int, schedule: str, *more: str) -> str:
        capsys.readouterr()
        assert fork(source, tmp_path / "v1", step, *INHERIT, "--lfr-schedule", schedule, *more) == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    def steps(*phases: str) -> str:
        return f"[{', '.join(f'{{kind: {phase}, unit: steps}}' for phase in phases)}]"

    assert "phase 0 (learn) is trained, with 192 samples until step 8, where the schedule has 216" in refused(
        lfr, 10, steps("learn, duration: 9", "review, duration: 9")
    )
    assert "phase 0 (learn) is trained, with 240 samples until step 10, where the schedule has 192" in refused(
        uniform, 10, "lfr"
    )
    assert "phase 1 (focus) is trained, with kind focus, where the schedule has learn" in refused(lfr, 10, "learn-only")
    assert "phase 1 (focus) is trained, but the schedule ends before it" in refused(
        lfr, 10, steps("learn, duration: 8")
    )
    other = (
        "focus, duration: 3, drop: 0.6, sampling: choice, score: detrended, weights: capped, least_scored: 0.8, "
        "passes: continued"
    )
    assert "with drop 0.5, where the schedule has 0.6" in refused(
        lfr, 10, steps("learn, duration: 8", other, "review, duration: 9")
    )
    assert "with weights capped, where the schedule has perplexity" in refused(
        lfr, 10, steps("learn, duration: 8", other.replace("0.6", "0.5").replace("capped", "perplexity"))
    )
    longer = other.replace("0.6", "0.5").replace("duration: 3", "duration: 5")
    assert "the order of phase 1 (focus) follows its length" in refused(
        lfr, 10, steps("learn, duration: 8", longer, "review, duration: 7")
    )
    assert "the learning rate follows the run's length" in refused(lfr, 8, "lfr", "--train-iters", "40")
    assert "--lfr-schedule nothing: neither a preset" in refused(lfr, 8, "nothing")
    assert "there is no array 'ref'" in refused(uniform, 8, TAILS)
    called = steps("learn, duration: 8", "focus, duration: 12, score: 'call:no_such:function'")
    assert "phase 1: score call:no_such:function: importing no_such fails" in refused(lfr, 8, called)
    assert "scope 'sums': choose from 'easy', 'hard'" in refused(
        lfr, 8, steps("learn, duration: 8", "review, duration: 12, scope: [sums]")
    )
    capsys.readouterr()
    assert fork(lfr, tmp_path / "v1", 8, *INHERIT, "--lfr-scores", reference) == 2
    assert "--lfr-scores: goes with --lfr-schedule" in capsys.readouterr().err
    assert folder_bytes(lfr) == before
