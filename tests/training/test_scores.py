"""Scores from outside of a run, --lfr-scores: from the command line to orders, resume and report."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr.analysis import open_run
from megatron_lfr.cli import main
from megatron_lfr.data.corpus.block_values import open_values
from megatron_lfr.data.corpus.blocks import BlockDataset
from support.tiny_run import STOPPED, tiny_flags

Floats = npt.NDArray[np.float32]
BLENDED = ["--data-path", "0.5", "{0}", "0.5", "{1}"]


@pytest.fixture(scope="module")
def reference(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the losses of a reference model on every training block, as `evaluate` writes them."""
    folder = tmp_path_factory.mktemp("reference")
    flags = [*tiny_flags(corpus), "--lfr-schedule", "uniform", "--train-epochs", "0.5", "--save", str(folder / "run")]
    assert main(["train", *flags]) == 0
    path = folder / "losses.npy"
    assert main(["evaluate", "--run", str(folder / "run"), "--split", "train", "--per-block", str(path)]) == 0
    return path


def blocks(corpus: list[str]) -> int:
    return BlockDataset(corpus, 16, "90,10,0").train.num_blocks


def flags_of(corpus: list[str], save: Path, score: str, *words: str) -> list[str]:
    schedule = f"[{{kind: learn, duration: 0.6}}, {{kind: focus, duration: 0.4, drop: 0.5, score: '{score}'}}]"
    flags = [*tiny_flags(corpus), "--lfr-schedule", schedule, "--save", str(save), *words]
    del flags[flags.index("--train-epochs") : flags.index("--train-epochs") + 2]
    return flags


def error_of(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["train", *flags]) == 2
    return capsys.readouterr().err


def test_the_file_of_evaluate_says_what_it_is(reference: Path, corpus: list[str]) -> None:
    described = json.loads(reference.with_name("losses.npy.json").read_text())
    assert described["corpus"] == BlockDataset(corpus, 16, "90,10,0").digests()
    assert described["blocks"] == len(np.load(reference)) == blocks(corpus)
    forward, training = described["flops"]["forward"], described["flops"]["training"]
    assert training / forward == pytest.approx(3 * 0.5, rel=0.01)  # half an epoch, of three times the cost a token
    assert open_values("ref", reference, "--lfr-scores").flops("lfr_scores") == forward + training


@pytest.mark.parametrize("score", ["file:ref", "excess:ref"])
def test_a_focus_ranks_by_the_file(score: str, reference: Path, corpus: list[str], tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert main(["train", *flags_of(corpus, save, score, "--lfr-scores", f"ref={reference}")]) == 0
    run = open_run(save)
    ledger = run.empty_ledger()
    learn, focus = [(phase, ledger.detrended_scores()) for phase in run.phases(ledger)]
    losses: Floats = np.load(reference)
    scores = losses if score == "file:ref" else focus[1] - losses
    assert np.array_equal(focus[0].scores, scores, equal_nan=True)
    seen = np.flatnonzero(~np.isnan(scores))
    easiest = seen[np.argsort(scores[seen], kind="stable")][: len(seen) // 2]
    assert not np.isin(focus[0].order, easiest).any()
    assert focus[0].selection is not None
    assert focus[0].selection.dropped == len(seen) // 2
    assert learn[0].selection is None
    assert main(["report", str(save)]) == 0
    assert main(["inspect", str(save), "--hardest", "2", "--chars", "0"]) == 0


def test_a_focus_ranks_by_how_much_losses_still_fall(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the visits of the run; stopped within the Focus, it goes on to the same bits."""
    flags = {name: flags_of(corpus, tmp_path / name, "improvement") for name in ("complete", "stopped", "short")}
    for words in flags.values():
        at = words.index("--lfr-schedule") + 1
        words[at] = words[at].replace("duration: 0.6", "duration: 1.5")
    assert main(["train", *flags["complete"]]) == 0
    run = open_run(tmp_path / "complete")
    ledger = run.empty_ledger()
    learn, focus = run.phases(ledger)
    scores = focus.scores
    curves = run.empty_ledger()
    curves.record_phase(0, learn.planned.global_batch_size, learn.order, learn.nll)
    curves.begin_phase(focus.planned.first_step, True)
    location, spread, level = (getattr(curves.references[0].curves(), name) for name in ("location", "spread", "level"))
    for block in range(0, len(scores), 5):
        seen = [(v["step"] - 1, v["nll"]) for v in run.visits([block]) if v["phase"] == 0]
        above = [(loss - location[step]) / spread[step] for step, loss in seen[-2:]]
        expected = level[1] * (above[0] - above[1]) if len(seen) > 1 else np.nan
        assert scores[block] == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    known = np.flatnonzero(~np.isnan(scores))
    assert 0.4 < len(known) / len(scores) < 0.6  # half an epoch of second visits
    least = known[np.argsort(scores[known], kind="stable")][: len(known) // 2]
    assert not np.isin(focus.order, least).any()
    assert main(["train", *flags["stopped"], "--exit-interval", str(focus.planned.first_step + 2)]) == STOPPED
    assert main(["train", *flags["stopped"]]) == 0
    for phase in (0, 1):
        one, other = (tmp_path / name / f"journal/phase_{phase:03d}.npy" for name in ("complete", "stopped"))
        assert one.read_bytes() == other.read_bytes()
    assert main(["report", str(tmp_path / "complete")]) == 0
    page = (tmp_path / "complete/report.html").read_text()
    assert "on the improvement of the loss; seen less than twice: " in page
    flags["short"][flags["short"].index("--lfr-schedule") + 1] = (
        "[{kind: learn, duration: 1}, {kind: focus, duration: 0.4, drop: 0.5, score: improvement}]"
    )
    error = error_of(flags["short"], capsys)
    assert "phase 1: score improvement needs blocks that have been trained on twice" in error
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("declines", [True, False])
def test_a_guard_turns_a_focus_into_a_review(
    declines: bool, reference: Path, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped within the phase, it goes on to the same bits; a Focus that is declined has learn-only's order."""
    worth = tmp_path / "worth.npy"
    np.save(worth, np.load(reference) if not declines else np.ones(blocks(corpus), np.float32))
    words = ("--lfr-scores", f"worth={worth}")
    flags = {name: flags_of(corpus, tmp_path / name, "recorded", *words) for name in ("complete", "stopped", "learn")}
    for name, given in flags.items():
        at = given.index("--lfr-schedule") + 1
        guard = "kind: learn" if name == "learn" else "kind: focus, drop: 0.5, guard: 'file:worth'"
        given[at] = f"[{{kind: learn, duration: 1.0}}, {{duration: 0.4, {guard}}}]"
    flags["learn"] = flags["learn"][:-2]
    assert main(["train", *flags["complete"]]) == 0
    assert ("; review instead" if declines else "; focus") in capsys.readouterr().out
    assert main(["train", *flags["learn"]]) == 0
    phase, other = (list(open_run(tmp_path / name).phases())[1] for name in ("complete", "learn"))
    assert np.array_equal(phase.order, other.order) == declines == (phase.selection is None)
    assert main(["train", *flags["stopped"], "--exit-interval", str(phase.planned.first_step + 2)]) == STOPPED
    assert main(["train", *flags["stopped"]]) == 0
    journals = [tmp_path / name / "journal/phase_001.npy" for name in ("complete", "stopped")]
    assert journals[0].read_bytes() == journals[1].read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "complete/metrics.jsonl").read_text().splitlines()]
    taken = "review" if declines else "focus"
    assert [(row["kind"], row["guard"]["accepted"]) for row in rows if "guard" in row] == [(taken, not declines)]
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "complete"), "--step", str(phase.planned.end_step)]) == 0
    assert f"phase 1 {taken}: " in capsys.readouterr().out
    assert main(["report", str(tmp_path / "complete")]) == 0
    assert "Phase 1, a Focus of the schedule: " in (tmp_path / "complete/report.html").read_text()


def test_a_resume_needs_the_same_file(
    reference: Path, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.npy"
    np.save(mine, np.load(reference))
    flags = flags_of(corpus, tmp_path / "run", "excess:ref", "--lfr-scores", f"ref={mine}")
    assert main(["train", *flags, "--exit-interval", "4"]) == STOPPED
    assert "ref=" in capsys.readouterr().out  # no description: taken on trust
    losses = np.load(reference)
    losses[3] += 1
    np.save(mine, losses)
    assert "--lfr-scores ref: is not the run's file, or has changed since the run began" in error_of(flags, capsys)
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "has changed since the run began" in capsys.readouterr().err
    moved = tmp_path / "moved.npy"
    shutil.copy(reference, moved)
    assert main(["train", *flags[:-1], f"ref={moved}"]) == 0


def test_a_finished_run_learns_where_its_file_is_now(
    reference: Path, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The other paths are those of the folder that it was started in."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    np.save("mine.npy", np.load(reference))
    flags = flags_of([os.path.relpath(prefix) for prefix in corpus], tmp_path / "run", "file:ref")
    assert main(["train", *flags, "--lfr-scores", "ref=mine.npy"]) == 0
    monkeypatch.chdir(tmp_path)
    Path("a/mine.npy").rename("moved.npy")
    assert main(["report", "run"]) == 2
    flags = flags_of(corpus, tmp_path / "run", "file:ref", "--lr", "0.5", "--lfr-scores", "ref=moved.npy")
    capsys.readouterr()
    assert main(["train", *flags]) == 0
    out = capsys.readouterr().out
    assert "--lr 0.01 -> 0.5" in out
    assert re.search("--lfr-scores .* -> ", out) is None
    before = (tmp_path / "run/config_history.yaml").read_bytes()
    assert main(["train", *flags]) == 0
    assert (tmp_path / "run/config_history.yaml").read_bytes() == before
    monkeypatch.chdir("/")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert main(["inspect", str(tmp_path / "run"), "--step", "1", "--chars", "0"]) == 0


def test_a_folder_beside_the_run_is_not_needed_where_it_was_started(
    reference: Path, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path leads from the folder that the run was started in."""
    shutil.copy(reference, tmp_path / "ref.npy")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags_of(corpus, Path("run"), "file:ref", "--lfr-scores", "ref=ref.npy")]) == 0
    monkeypatch.chdir("/")
    assert main(["inspect", str(tmp_path / "run"), "--step", "1", "--chars", "0"]) == 0


def changed(reference: Path, block: int, value: float) -> Floats:
    losses: Floats = np.load(reference)
    losses[block] = value
    return losses


def test_illegal_files_are_refused_by_name(
    reference: Path, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n = blocks(corpus)
    cases: dict[str, tuple[Any, str]] = {
        "nan": (changed(reference, 7, np.nan), "phase 1: array x: block 7 has nan, must be a finite number"),
        "inf": (changed(reference, 9, -np.inf), "phase 1: array x: block 9 has -inf, must be a finite number"),
        "short": (np.zeros(n - 1, np.float32), f"array x: has the shape [{n - 1}], but there are {n} blocks"),
        "double": (np.zeros(n), "must hold float32 or uint32 [blocks]"),
        "integers": (np.zeros(n, np.uint32), "phase 1: array x: is of type uint32, must be float32"),
        "objects": (np.array([{}] * n), "of objects; make it again"),
    }
    for name, (array, message) in cases.items():
        path = tmp_path / f"{name}.npy"
        np.save(path, array, allow_pickle=True)
        error = error_of(flags_of(corpus, tmp_path / "run", "file:x", "--lfr-scores", f"x={path}"), capsys)
        assert "--lfr-scores" in error, name
        assert message in error, name
    text = tmp_path / "text.npy"
    text.write_bytes(b"\x80\x04N.")  # a pickle
    unclosed = tmp_path / "unclosed.npy"
    unclosed.write_bytes(reference.read_bytes().replace(b",), }", b",], }"))
    cut = tmp_path / "cut.npy"
    cut.write_bytes(reference.read_bytes()[:-1])
    for word, message in (
        (f"x={text}", "is no .npy file"),
        (f"x={cut}", "it is cut short, damaged or of objects; make it again"),
        (f"x={tmp_path / 'none.npy'}", "No such file"),
        (f"x={unclosed}", "it is cut short, damaged or of objects; make it again"),
        (f"y={reference}", "phase 1: there is no array 'x'; given: y"),
        (str(reference), "expected NAME=FILE.npy"),
    ):
        assert message in error_of(flags_of(corpus, tmp_path / "run", "file:x", "--lfr-scores", word), capsys)
    assert not (tmp_path / "run").exists()


def test_a_described_file_must_be_of_this_corpus_and_as_it_was(
    reference: Path, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("losses.npy", "losses.npy.json"):
        shutil.copy(reference.with_name(name), tmp_path / name)
    word = ("--lfr-scores", f"x={tmp_path / 'losses.npy'}")
    other = flags_of(corpus, tmp_path / "run", "file:x", *word, "--split", "80,20,0")
    assert "was made of another corpus, --split or --seq-length: prefix 1 of 2 differs" in error_of(other, capsys)
    fewer = flags_of(corpus[:1], tmp_path / "run", "file:x", *word)
    assert "was made of 2 prefixes, the corpus has 1" in error_of(fewer, capsys)
    np.save(tmp_path / "losses.npy", changed(reference, 0, 1.0))
    flags = flags_of(corpus, tmp_path / "run", "file:x", *word)
    assert "is not the file that losses.npy.json beside it describes" in error_of(flags, capsys)
    (tmp_path / "losses.npy.json").write_text("[")
    assert "losses.npy.json beside it is not readable as JSON" in error_of(flags, capsys)


@pytest.mark.parametrize("score", ["file", "file:", "excess:a b", "loss", "recorded:x"])
def test_what_is_no_score_is_refused(score: str, corpus: list[str], tmp_path: Path, capsys: Any) -> None:
    assert "choose from recorded, detrended, rescored, shuffled, improvement, file:NAME" in error_of(
        flags_of(corpus, tmp_path / "run", score), capsys
    )


def test_a_run_from_before_weights_keeps_its_own(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its schedule file says nothing of weights, which then meant exp(score); what it remembers neither."""
    path = tmp_path / "schedule.yaml"
    focus = "{kind: focus, duration: 0.4, drop: 0.5, sampling: choice%s}"
    flags = flags_of(corpus, tmp_path / "run", "recorded")
    flags[flags.index("--lfr-schedule") + 1] = str(path)
    learn = "- {kind: learn, duration: 0.6}\n- "
    path.write_text(learn + focus % ", weights: perplexity")
    assert main(["train", *flags, "--exit-interval", "4"]) == STOPPED
    remembered = json.loads((tmp_path / "run/journal/meta.json").read_text())["segments"][0]["schedule"]
    assert {"weights", "drop_hardest", "explore", "weight", "copies"}.isdisjoint(remembered[1])
    path.write_text(learn + focus % ", weights: capped")
    assert "schedule.yaml has changed since the run began" in error_of(flags, capsys)
    path.write_text(learn + focus % "")
    assert main(["train", *flags, "--exit-interval", "12"]) in (0, STOPPED)
    assert [phase.weighting for phase in (p.phase for p in open_run(tmp_path / "run").plan.phases)][1] == "perplexity"


def test_weights_and_copies_are_checked_before_a_run_begins(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n = blocks(corpus)
    arrays = {
        "negative": np.where(np.arange(n) == 5, -1, 1).astype(np.float32),
        "zero": np.zeros(n, np.float32),
        "groups": np.arange(n, dtype=np.uint32),
        "beyond": np.arange(1, n + 1, dtype=np.uint32),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    for phase, words, message in (
        ("weight: 'file:x'", "x=negative", "phase 0: array x: block 5 has -1.0, must be 0 or more, as a weight"),
        ("weight: 'file:x'", "x=zero", "phase 0: array x: every block has the weight 0"),
        ("weight: 'file:x'", "x=groups", "phase 0: array x: is of type uint32, must be float32"),
        ("copies: once", "copies=zero", "phase 0: array copies: is of type float32, must be uint32"),
        (
            "copies: log",
            "copies=beyond",
            f"array copies: block {n - 1} has {n}, must be below the number of blocks, {n}",
        ),
        ("copies: log", "x=groups", "phase 0: there is no array 'copies'"),
    ):
        flags = flags_of(
            corpus, tmp_path / "run", "recorded", "--lfr-scores", f"{words.replace('=', f'={tmp_path}/')}.npy"
        )
        flags[flags.index("--lfr-schedule") + 1] = f"[{{kind: learn, duration: 1, {phase}}}]"
        assert message in error_of(flags, capsys)
    flags[flags.index("--lfr-schedule") + 1] = "[{kind: learn, duration: 0.2, copies: once}]"
    common = ["commonness", "--data-path", *corpus, "--output", str(tmp_path / "common")]
    assert main([*common, "--seq-length", "16", "--split", "90,10,0", "--memory-gb", "1"]) == 0
    flags[flags.index("--lfr-scores") + 1] = f"copies={tmp_path}/common/block_copies.npy"
    assert "not which blocks are copies of each other; that is block_representative.npy" in error_of(flags, capsys)
    flags[flags.index("--lfr-scores") + 1] = f"copies={tmp_path}/common/block_representative.npy"
    assert main(["train", *flags, "--save", str(tmp_path / "counted")]) == 0
    assert main(["report", str(tmp_path / "counted")]) == 0
    assert "(copies count once)" in (tmp_path / "counted/report.html").read_text()
    flags[flags.index("--lfr-scores") + 1] = f"copies={tmp_path}/groups.npy"
    assert main(["train", *flags, "--lfr-scores", f"more={tmp_path}/zero.npy"]) == 0
    assert "--lfr-scores more: no phase of the schedule uses it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("{kind: focus, duration: 0.4, weight: 'file:w'}", ["--lfr-focus-scope", "per-corpus"]),
        ("{kind: focus, duration: 0.4, weight: 'file:w', least_scored: 0.5}", BLENDED),
        ("{kind: review, duration: 0.4, weight: 'file:w', scope: [hard]}", []),
        ("{kind: review, duration: 0.4, weight: 'file:w', scope: [easy], replay: 0.5}", []),
        ("{kind: learn, duration: 0.4, weight: 'file:w'}", BLENDED),
    ],
)
def test_a_part_in_which_nothing_counts_is_refused_before_the_first_step(
    phase: str, words: list[str], corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of one prefix has the weight 0, and the phase samples from that prefix by itself."""
    easy, n = BlockDataset(corpus[:1], 16, "90,10,0").train.num_blocks, blocks(corpus)
    np.save(tmp_path / "w.npy", (np.arange(n) < easy).astype(np.float32))
    given = [word.format(*corpus) for word in words]
    flags = flags_of(corpus, tmp_path / "run", "recorded", *given, "--lfr-scores", f"w={tmp_path}/w.npy")
    flags[flags.index("--lfr-schedule") + 1] = f"[{{kind: learn, duration: 0.6}}, {phase}]"
    message = f"phase 1: array w: blocks {easy} to {n - 1}, from which the phase samples apart, all have the weight 0"
    assert message in error_of(flags, capsys)
    assert not (tmp_path / "run").exists()


def test_what_was_trained_is_saved_where_all_that_a_focus_keeps_has_no_weight(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n = blocks(corpus)
    np.save(tmp_path / "w.npy", (np.arange(n) < n // 2).astype(np.float32))
    np.save(tmp_path / "s.npy", np.arange(n, dtype=np.float32))
    words = ["--lfr-scores", f"w={tmp_path}/w.npy", "--lfr-scores", f"s={tmp_path}/s.npy"]
    flags = flags_of(corpus, tmp_path / "run", "recorded", *words)
    focus = "{kind: focus, duration: 0.4, drop: 0.5, score: 'file:s', weight: 'file:w'}"
    flags[flags.index("--lfr-schedule") + 1] = f"[{{kind: learn, duration: 0.6}}, {focus}]"
    message = "phase 1: focus: all that it keeps has the weight 0 (file:w)"
    assert message in error_of(flags, capsys)
    assert open_run(tmp_path / "run").folder.find_checkpoint() is not None
