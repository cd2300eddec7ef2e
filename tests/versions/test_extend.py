"""Extended runs: what goes on, what stays as it is, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing as mp
import yaml

from megatron_lfr.cli import main
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.run_folder import RunFolder
from support import kill_cases
from support.folder_bytes import folder_bytes
from support.run_process import Run
from support.same_run import assert_same_run, metrics_without_time
from support.tiny_run import STOPPED, tiny_flags
from support.two_ranks import train_two_ranks

STEPS = 10


@pytest.fixture(scope="module")
def grown(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write one more prefix beside the corpus, whose name has no beginning in common with the others'."""
    prefix = tmp_path_factory.mktemp("new") / "recent_text_document"
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in range(30):
            tokens = (document + 3 * np.arange(20 + document)) % 60
            writer.add_document(np.append(tokens, 63).astype(np.uint16))
    return [*corpus, str(prefix)]


def flags(corpus: list[str], *more: str) -> list[str]:
    """Return the flags of a run of one rate, logged at each step, whose batches are large enough that a Focus takes
    place after it is extended."""
    length = tiny_flags(corpus)
    at = length.index("--train-epochs")
    constant = ["--lr-decay-style", "constant", "--log-interval", "1", "--save-interval-mins", "None"]
    return [*length[:at], *length[at + 2 :], "--global-batch-size", "24", *constant, *more]


def train(*words: str) -> int:
    return main(["train", *words])


def go_on(run: Path, *more: str) -> int:
    return train("--config", str(run / "config.yaml"), "--save", str(run), *more)


def extend(run: Path, *words: str) -> int:
    return main(["extend", "--run", str(run), *words])


@pytest.fixture(scope="module")
def begun(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of all phases to its end. Not to be written to."""
    folder = tmp_path_factory.mktemp("begun") / "main"
    retained = ["--save-retain-steps", "4"]
    assert train(*flags(corpus, "--train-iters", str(STEPS)), *retained, "--save", str(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def uniform(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of one Learn to its end. Not to be written to."""
    folder = tmp_path_factory.mktemp("uniform") / "main"
    assert train(*uniform_flags(corpus, STEPS), "--save", str(folder)) == 0
    return folder


def uniform_flags(corpus: list[str], steps: int) -> list[str]:
    return flags(corpus, "--lfr-schedule", "uniform", "--train-iters", str(steps))


def copy(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to)


@pytest.fixture(scope="module")
def extended(begun: Path, grown: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the run for 14 more steps, on new blocks too. Not to be written to."""
    folder = copy(begun, tmp_path_factory.mktemp("extended") / "main")
    assert extend(folder, "--data-path", *grown, "--train-iters", "+14", "--replay", "0.25") == 0
    assert go_on(folder, "--save-retain-steps", "4", "14") == 0
    return folder


def phases(run: Path) -> list[dict[str, Any]]:
    return [row for row in metrics_without_time(run) if row["event"] == "phase"]


def test_what_was_trained_stays_and_the_new_is_learned_first(begun: Path, extended: Path) -> None:
    before, after = metrics_without_time(begun), metrics_without_time(extended)
    assert after[: len(before)] == before
    for path in (begun / "journal").glob("*.npy"):
        assert path.read_bytes() == (extended / "journal" / path.name).read_bytes()
    learn, *others = phases(extended)[5:]
    assert (learn["kind"], learn["steps"]) == ("learn", 6)  # 40 % of 14
    assert learn["draws_by_domain"]["recent"] == 108  # of 144
    assert [row["kind"] for row in others] == ["focus", "review", "focus", "review"]
    assert set(others[0]["left_out_by_domain"]) == {"easy", "hard", "recent"}  # as they were called before
    facts = RunFolder(extended).identity()
    assert facts["segments"][:1] == RunFolder(begun).identity()["segments"]
    assert facts["corpus"][:2] == RunFolder(begun).identity()["corpus"]
    settings = [RunFolder(extended).settings_at(step)["train_iters"] for step in (0, 9, 10)]
    assert settings == [10, 10, 24]


def test_stops_at_boundaries_and_between_them_change_nothing(
    begun: Path, extended: Path, grown: list[str], tmp_path: Path
) -> None:
    run = copy(begun, tmp_path / "main")
    assert extend(run, "--data-path", *grown, "--train-iters", "24", "--replay", "0.25") == 0
    retained = ["--save-retain-steps", "4", "14"]
    for stop in (13, 16, 17, 18):
        assert go_on(run, *retained, "--exit-interval", str(stop)) == STOPPED
    assert go_on(run, *retained) == 0
    assert_same_run(extended, run)


def test_a_run_that_is_not_finished_is_extended_beyond_its_end(
    corpus: list[str], grown: list[str], extended: Path, tmp_path: Path
) -> None:
    run = tmp_path / "main"
    words = flags(corpus, "--train-iters", str(STEPS))
    assert train(*words, "--save", str(run), "--exit-interval", "7") == STOPPED
    assert extend(run, "--data-path", *grown, "--train-iters", "+14", "--replay", "0.25") == 0
    assert go_on(run, "--exit-interval", "None") == 0
    assert [row["order_hash"] for row in phases(run)] == [row["order_hash"] for row in phases(extended)]
    assert losses(run) == losses(extended)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics_without_time(run) if row["event"] == "train"]


def test_another_layout_trains_on_the_same_blocks(
    begun: Path, extended: Path, grown: list[str], tmp_path: Path
) -> None:
    run = copy(begun, tmp_path / "main")
    assert extend(run, "--data-path", *grown, "--train-iters", "+14", "--replay", "0.25") == 0
    train_two_ranks(["--config", str(run / "config.yaml"), "--save", str(run)], tmp_path / "printed")
    # The orders of a Focus hang on the last digits of the losses.
    one, two = ([row["order_hash"] for row in phases(r) if row["kind"] != "focus"] for r in (extended, run))
    assert one == two
    np.testing.assert_allclose(losses(run)[:16], losses(extended)[:16], rtol=1e-4)


def test_a_branch_of_an_extended_run_and_an_extension_of_a_branch(
    begun: Path, extended: Path, grown: list[str], tmp_path: Path
) -> None:
    before = folder_bytes(extended)
    for step in (4, 10, 14):
        save = tmp_path / f"from{step}"
        words = ["branch", "--from", str(extended), "--at-step", str(step), "--lr-schedule", "inherit"]
        assert main([*words, "--save", str(save)]) == 0
        if step == 4:  # it was saved when the run had one segment: the branch has one, too
            assert len(RunFolder(save).plan()[0].segments) == 1
            assert RunFolder(save).identity() == RunFolder(begun).identity()
            assert extend(save, "--data-path", *grown, "--train-iters", "+14", "--replay", "0.25") == 0
        assert go_on(save) == 0
        assert [row["order_hash"] for row in phases(save)] == [row["order_hash"] for row in phases(extended)]
        assert losses(save) == losses(extended)
    assert folder_bytes(extended) == before


def test_a_kill_leaves_the_run_as_it_was_or_extended(begun: Path, grown: list[str], tmp_path: Path) -> None:
    runs = [copy(begun, tmp_path / str(number) / "main") for number in range(kill_cases.EXTENSION_MOMENTS)]
    before = {name: content for name, (_, content) in folder_bytes(begun).items()}
    given = ([str(run) for run in runs], grown)
    mp.start_processes(kill_cases.kill_extensions, given, nprocs=1, start_method="forkserver")
    segments = []
    for run in runs:
        folder = RunFolder(run)
        plan, _ = folder.plan()
        segments.append(len(plan.segments))
        assert folder.settings()["train_iters"] == plan.total_steps  # for every reader, whatever the kill left
        assert len(folder.settings_at(plan.total_steps)["data_path"]) == len(folder.identity()["corpus"])
        assert main(["inspect", str(run), "--block", "0"]) == 0
        if segments[-1] == 1:
            kept = {name: content for name, (_, content) in folder_bytes(run).items() if Path(name).name[0] != "."}
            assert kept.keys() - before.keys() <= {"lock"}
            assert all(kept[name] == content for name, content in before.items())
            assert extend(run, "--data-path", *grown, "--train-iters", "+8") == 0
        assert go_on(run) == 0
        assert not list(run.glob("*extension*"))
        assert_same_run(runs[0], run)
    assert segments == [1, 2, 2, 2, 2]


def test_a_branch_that_is_killed_in_its_extension_goes_on(
    begun: Path, extended: Path, grown: list[str], tmp_path: Path
) -> None:
    """SIGKILL in the middle of the new segment, after a checkpoint in it: the parent stays as it is."""
    before, run = folder_bytes(begun), tmp_path / "branch"
    words = ["branch", "--from", str(begun), "--at-step", str(STEPS), "--lr-schedule", "inherit"]
    assert main([*words, "--save", str(run)]) == 0
    assert extend(run, "--data-path", *grown, "--train-iters", "+14", "--replay", "0.25") == 0
    given = ["--config", str(shutil.copy(run / "config.yaml", tmp_path / "given.yaml")), "--save-interval", "4"]
    code, printed = Run([*given, "--callback", "support.own_callbacks:KilledAfterStep17"]).end()
    assert code == -signal.SIGKILL, printed
    assert RunFolder(run).checkpoint().iteration == 16
    assert folder_bytes(begun) == before
    assert train(*given) == 0
    assert_same_run(extended, run)
    assert folder_bytes(begun) == before


def refused(capsys: pytest.CaptureFixture[str], run: Path, *words: str, command: str = "extend") -> str:
    """Return what a command prints that is refused and changes nothing."""
    before = {name: content for name, (_, content) in folder_bytes(run).items()}
    capsys.readouterr()
    assert main([command, "--run" if command == "extend" else "--save", str(run), *words]) == 2
    assert {name: content for name, (_, content) in folder_bytes(run).items()} == before
    return capsys.readouterr().err


def test_what_cannot_be_is_refused(
    begun: Path, grown: list[str], corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--train-iters", "+5"]
    easy, hard, new = grown
    cases = {
        "prefix 1 of 3 is not the run's, or has changed": ["--data-path", hard, easy, new, *more],
        "prefix 2 of 2 is not the run's, or has changed": ["--data-path", easy, new, *more],
        "names 1 prefixes, the run had 2 already": ["--data-path", easy, *more],
        "phase 0: replay 0.5: the phase is about all blocks": ["--replay", "0.5", *more],
        "--train-iters: give the length of the new segment": [],
        "--train-iters 10: must be more than the 10 that the run has": ["--train-iters", "10"],
        "--train-iters +0: must be at least +1": ["--train-iters", "+0"],
        "--train-iters five: give the new segment's length": ["--train-iters", "five"],
        "--global-batch-size 6: must be a multiple of --micro-batch-size 4": ["--global-batch-size", "6", *more],
        "too short for the schedule's 5 phases": ["--train-iters", "+4"],
        "phase 6: score call:no_such:function: importing no_such fails": [
            *(
                "--lfr-schedule",
                "[{kind: learn, duration: 3}, {kind: focus, duration: 1, score: 'call:no_such:function'}]",
            ),
        ],
        "phase 6: no block in its scope has a score yet": [
            *("--data-path", *grown, "--lfr-schedule"),
            "[{kind: learn, duration: 2, unit: steps, scope: [easy]}, "
            "{kind: focus, duration: 2, unit: steps, scope: [recent]}]",
        ],
        "phase 0: scope 'books': choose from 'easy', 'hard', 'recent'": [
            *("--data-path", *grown, "--train-iters", "+4"),
            *("--lfr-schedule", "[{kind: learn, duration: 1.0, unit: share, scope: [books]}]"),
        ],
    }
    for message, words in cases.items():
        assert message in refused(capsys, begun, *words)
    (tmp_path / "empty").mkdir()
    assert "not a run folder" in refused(capsys, tmp_path / "empty", *more)
    given = refused(capsys, begun, *flags(grown, "--train-iters", str(STEPS)), command="train")
    assert "names 3 prefixes, the run has 2 (megatron-lfr extend appends prefixes)" in given
    given = refused(capsys, begun, *flags(corpus, "--train-iters", "20"), command="train")
    assert "megatron-lfr extend adds a segment" in given


def test_a_rate_that_follows_the_length(
    uniform: Path, corpus: list[str], grown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(uniform, tmp_path / "main")
    for name in ("config.yaml", "config_history.yaml"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace("lr_decay_style: constant", "lr_decay_style: cosine"))
    cosine = ["--lr-decay-style", "cosine"]
    assert "step 1, which is trained, would have had" in refused(capsys, run, "--train-iters", "+5")
    longer = [*uniform_flags(corpus, 15), *cosine]
    given = refused(capsys, run, *longer, command="train")
    assert "the run gets longer, by 5 steps, but the learning rate follows the run's length: step 1," in given
    assert "it would go on at 0.00165435 after 0." in given  # 0.5 (1 + cos(11/15 pi)) of 0.01
    assert train(*longer, "--save", str(run), "--override-opt_param-scheduler") == 0
    rates = [row["lr"] for row in metrics_without_time(run) if row["event"] == "train"]
    np.testing.assert_allclose(rates[10:], 0.005 * (1 + np.cos(np.pi * np.arange(11, 16) / 15)), atol=1e-12)
    assert not RunFolder(run).recorded_settings["override_opt_param_scheduler"]


def test_what_a_user_may_not_have_meant_is_said(
    uniform: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(uniform, tmp_path / "main")
    assert extend(run, "--train-iters", "+5") == 0
    assert "note:" not in capsys.readouterr().out
    assert extend(run, "--train-iters", "+5") == 0  # again, before anything of it is trained
    assert "note: segment 2, steps 11 to 15, is still to come: this one follows it" in capsys.readouterr().out
    decayed = copy(uniform, tmp_path / "decayed")
    for name in ("config.yaml", "config_history.yaml"):
        text = (decayed / name).read_text().replace("lr_decay_style: constant", "lr_decay_style: linear")
        (decayed / name).write_text(text.replace("lr_decay_iters: null", f"lr_decay_iters: {STEPS}"))
    said = f"the learning rate has decayed by step {STEPS}, and stays at 0"
    given = ["--train-iters", "12", "--exit-interval", "11"]
    assert go_on(copy(decayed, tmp_path / "longer"), *given) == STOPPED
    assert f"--train-iters 12: the run gets longer, by 2 steps; {said}" in capsys.readouterr().out
    assert extend(decayed, "--train-iters", "+5") == 0
    assert f"note: {said}" in capsys.readouterr().out


def test_a_longer_run_of_uniform_is_the_run_of_that_length(
    uniform: Path, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(uniform, tmp_path / "main")
    words = uniform_flags(corpus, 16)
    capsys.readouterr()
    assert train(*words, "--save", str(run), "--exit-interval", "13") == STOPPED
    assert "--train-iters 16: the run gets longer, by 6 steps" in capsys.readouterr().out
    assert train(*words, "--save", str(run)) == 0
    assert train(*words, "--save", str(tmp_path / "one")) == 0
    assert losses(run) == losses(tmp_path / "one")
    journal = [np.load(run / f"journal/phase_00{phase}.npy") for phase in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(journal), np.load(tmp_path / "one/journal/phase_000.npy"))
    assert "--train-iters 10: must be more than the 10" in refused(
        capsys, run, *uniform_flags(corpus, STEPS), command="train"
    )


def test_a_new_batch_size_goes_on_with_the_pass(uniform: Path, corpus: list[str], tmp_path: Path) -> None:
    run = copy(uniform, tmp_path / "main")
    assert extend(run, "--train-iters", "+6", "--global-batch-size", "4") == 0
    assert go_on(run) == 0
    assert [len(np.load(run / f"journal/phase_00{phase}.npy")) for phase in (0, 1)] == [240, 24]
    consumed = [row["consumed_samples"] for row in metrics_without_time(run) if row["event"] == "train"]
    assert consumed == [*range(24, 241, 24), *range(244, 265, 4)]
    records = tmp_path / "step.npy"
    assert main(["inspect", str(run), "--step", "12", "--output", str(records)]) == 0
    assert len(np.load(records)) == 4


def test_scores_of_an_older_model_are_spoken_of(
    begun: Path, grown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = ["--data-path", *grown, "--train-iters", "+20"]
    for number, (schedule, replay, message) in enumerate(
        (
            ("lfr", "0", "phase 6 (focus, score: detrended) comes before any old block is trained on again"),
            ("lfr", "0.5", None),
            ("[{kind: learn, duration: 0.5, unit: share}, {kind: focus, duration: 0.5, unit: share}]", "0.5",
             "phase 6 (focus, score: recorded) ranks old blocks by losses of an older model"),
        )
    ):  # fmt: skip
        run = copy(begun, tmp_path / str(number))
        capsys.readouterr()
        assert extend(run, *lengths, "--lfr-schedule", schedule, "--replay", replay) == 0
        printed = capsys.readouterr().out
        assert (message or "note:") in printed if message else "note:" not in printed
        assert "steps 11 to 30 of 24 blocks each" in printed


def test_pages_follow(extended: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(extended), "--output", str(page)]) == 0
    text = page.read_text()
    assert "recent" in text
    records = tmp_path / "domain.json"
    assert main(["inspect", str(extended), "--domain", "recent", "--output", str(records)]) == 0
    visits = [row["visits"] for row in json.loads(records.read_text())]
    assert visits[:6] == [0] * 5 + [108]
    history = yaml.safe_load((extended / "config_history.yaml").read_text())
    assert [entry.get("segments", 1) for entry in history] == [1, 2, 2]


def test_an_extended_run_is_estimated_with_its_segments(extended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = ["estimate", "--config", str(extended / "config.yaml"), "--save", str(extended), "--json"]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["phases"]
    plan, _ = RunFolder(extended).plan()
    assert [(row["blocks"], row["steps"]) for row in rows] == [(one.samples, one.steps) for one in plan.phases]
    assert len(plan.segments) == 2
    assert main([*words, "--blocks", "100"]) == 2
    assert "was extended" in capsys.readouterr().err
