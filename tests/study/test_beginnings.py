"""Arms that fork from one beginning: their results are those of arms that each train it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_lfr.analysis import open_run
from megatron_lfr.study import job, runner
from megatron_lfr.study.beginnings import find_beginnings
from megatron_lfr.study.command import main
from megatron_lfr.study.definition import read_study
from megatron_lfr.study.layout import lay_out_study
from megatron_lfr.study.schedule import STOPPED, Ended, Task
from megatron_lfr.training.run import main as train
from support.study_samples import tiny_study, write_study

ARMS = ("uniform", "lfr", "focus-only")
CLOCKS = ("seconds", "cpu_seconds", "train_seconds")
FIRST, SECOND = 24, 32
"""Where Learn ends, and the first Focus, in a run of 60 steps."""


def run_here(
    tasks: Sequence[Task], slots: int, environments: Sequence[dict[str, str]], on_end: Callable[[Ended], None]
) -> list[Ended]:
    """Run each task's job in this process, and hold that what it needs has ended."""
    ended: list[Ended] = []
    for task in tasks:
        assert set(task.needs) <= {end.task.name for end in ended}
        ended.append(Ended(task, job.run_job(json.loads(Path(task.words[-1]).read_bytes()))))
        on_end(ended[-1])
    return ended


@pytest.fixture
def study(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs a study in a folder."""
    content = tiny_study(corpus)
    content |= {"seeds": [1], "compute": 60 * 8 * 16}
    content["arms"] = {name: {"settings": {"lfr_schedule": name}} for name in ARMS}
    content["arms"]["later"] = {"settings": {"lfr_schedule": "lfr", "lr_warmup_iters": 2}}
    monkeypatch.setattr(runner, "run_tasks", run_here)

    def run(folder: str, *flags: str) -> int:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        return main([str(write_study(Path("study.yaml"), content)), "--output", "out", "--jobs", "1", *flags])

    return run


def only(*arms: str) -> list[str]:
    return ["--only", *(f"*.{arm}.*" for arm in arms)]


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Return the results without what the clock says, and with their arrays."""
    rows = {}
    for path in sorted((out / "results").glob("*.json")):
        row = {name: value for name, value in json.loads(path.read_bytes()).items() if name not in CLOCKS}
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            rows[path.stem] = row | {name: array.tolist() for name, array in arrays.items()}
    return rows


def test_results_are_those_of_arms_that_train_their_beginnings(
    study: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arm in ARMS:
        assert study("alone", *only(arm)) == 0
    assert not (tmp_path / "alone" / "out" / "beginnings").exists()

    capsys.readouterr()
    assert study("together", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert f"steps 1 to {FIRST} of 3 runs" in printed
    assert f"steps {FIRST + 1} to {SECOND} of 2 runs" in printed
    _hold_what_is_saved(printed, Path("out"))

    # A beginning that was stopped goes on, and so does an arm that was stopped right after its fork.
    layout = lay_out_study(read_study(Path("study.yaml")), Path("out"))
    first, second = find_beginnings(layout.runs.values(), Path("out")).values()
    assert (first.steps, second.steps, second.after) == (FIRST, SECOND, first.key)
    assert stop_at(5, first.settings) == STOPPED
    assert study("together", *only(*ARMS)) == 0
    assert "3 fork from a beginning that is trained once" in capsys.readouterr().out
    out = tmp_path / "together" / "out"
    assert results(out) == results(tmp_path / "alone" / "out")
    assert len(results(out)) == len(ARMS)
    for one, steps in ((first, FIRST), (second, SECOND)):
        assert open_run(out / "beginnings" / one.key / "run").folder.checkpoint().iteration == steps

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "beginnings" in path.parts}
    arm = out / "runs" / "toy.S.cosine.lfr.s1"
    (out / "results" / "toy.S.cosine.lfr.s1.json").unlink()
    for path in sorted((arm / "run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (arm / "run").rmdir()
    assert study("together", *only(*ARMS)) == 0  # from a beginning that is trained already
    assert json.loads((arm / "run" / "run.json").read_bytes())["parent"]["step"] == SECOND
    assert results(out) == results(tmp_path / "alone" / "out")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def stop_at(step: int, settings: dict[str, Any]) -> int:
    file = Path("settings.yaml")
    file.write_text(json.dumps(settings))
    return train(["--config", str(file), "--exit-interval", str(step)])


def _hold_what_is_saved(printed: str, out: Path) -> None:
    """Two beginnings of three runs and of two: two runs need not train the one, and one the other."""
    layout = lay_out_study(read_study(Path("study.yaml")), out)
    runs = [run for run in layout.runs.values() if run.arm != "later"]
    step = 8 * 16 * runs[0].token_flops
    assert f"that saves {(2 * FIRST + SECOND - FIRST) * step:.3g} FLOP" in printed
    assert f"{(4 * 60 - 2 * FIRST - (SECOND - FIRST)) * step:.3g} FLOP; no run is done yet" in printed


def begin(study: Callable[..., int], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the run of lfr after 7 steps."""
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_tasks", lambda *arguments: [])
        assert study(folder, *only("lfr")) == 0
    layout = lay_out_study(read_study(Path("study.yaml")), Path("out"))
    assert stop_at(7, layout.runs["toy.S.cosine.lfr.s1"].settings) == STOPPED


def test_what_is_done_or_begun_goes_on_as_it_is(
    study: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mixed" / "out"
    assert study("mixed", *only("uniform")) == 0
    begin(study, "mixed", monkeypatch)
    uniform = (out / "results" / "toy.S.cosine.uniform.s1.json").stat().st_mtime_ns
    assert study("mixed", *only(*ARMS)) == 0
    assert not (out / "beginnings").exists()  # no two arms are left of one beginning
    assert len(results(out)) == len(ARMS)
    assert (out / "results" / "toy.S.cosine.uniform.s1.json").stat().st_mtime_ns == uniform


def test_what_was_begun_with_other_settings_is_refused(
    study: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: list[str]
) -> None:
    """`train` goes on with another learning rate, and takes a finished run as it is; a result would not say so."""
    begin(study, "other", monkeypatch)
    content = tiny_study(corpus) | {"seeds": [1], "compute": 60 * 8 * 16}
    content["rates"]["cosine"]["lr"] = 0.02
    flags = (str(write_study(tmp_path / "other.yaml", content)), "--output", "out", "--jobs", "1", *only("lfr"))
    begun = r"lfr.s1: was begun with something else \(lr: 0.01 -> 0.02\); remove it, or give another --output"
    with pytest.raises(ValueError, match=begun):
        main(flags)
    assert study("other", *only("lfr")) == 0
    with pytest.raises(ValueError, match=r"lr: 0.01 -> 0.02\); remove it and out/runs/toy.S.cosine.lfr.s1, or give"):
        main(flags)
    Path("out/results/toy.S.cosine.lfr.s1.json").unlink()
    with pytest.raises(ValueError, match=begun):
        main(flags)
    Path("out/runs/toy.S.cosine.lfr.s1/job.json").unlink()
    with pytest.raises(ValueError, match=r"job.json: does not say what was begun .*; remove out/runs/toy"):
        main(flags)


def test_what_is_evaluated_on_something_else_goes_on(
    study: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(study, "evaluated", monkeypatch)
    content = yaml.safe_load(Path("study.yaml").read_text())
    content["held_out"] = content["held_out"][:1]
    file = write_study(Path("less.yaml"), content)
    assert main([str(file), "--output", "out", "--jobs", "1", *only("lfr")]) == 0
    result = json.loads(Path("out/results/toy.S.cosine.lfr.s1.json").read_bytes())
    assert len(result["held_out"]["domains"]) == 1
    with pytest.raises(ValueError, match="was made of something else"):
        study("evaluated", *only("lfr"))


def test_seconds_of_all_processes_are_counted(
    study: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that was stopped, and of the beginning that a stopped run forked from."""
    stopped = {"toy.S.cosine.lfr.s1": 50}

    def stops(tasks: Sequence[Task], *arguments: Any) -> list[Ended]:
        ended = []
        for task in tasks:
            given = json.loads(Path(task.words[-1]).read_bytes())
            if (step := stopped.pop(task.name, None)) is not None:
                given["train"]["exit_interval"] = step
            ended.append(Ended(task, job.run_job(given)))
        return ended

    monkeypatch.setattr(runner, "run_tasks", stops)
    assert study("stopped", *only(*ARMS)) == 1
    out = tmp_path / "stopped" / "out"
    assert len(results(out)) == len(ARMS) - 1
    run, beginnings = out / "runs/toy.S.cosine.lfr.s1", sorted((out / "beginnings").iterdir())
    before = json.loads((run / "spent.json").read_bytes())
    assert before["seconds"] > max(json.loads((one / "beginning.json").read_bytes())["seconds"] for one in beginnings)
    assert study("stopped", *only(*ARMS)) == 0
    result = json.loads((out / "results/toy.S.cosine.lfr.s1.json").read_bytes())
    assert all(result[clock] > seconds for clock, seconds in before.items())


def test_seconds_of_training_are_kept_before_what_comes_after(
    study: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped as it evaluates ends at once."""
    spent = tmp_path / "one/out/runs/toy.S.cosine.later.s1/spent.json"
    seen = []
    monkeypatch.setattr(job, "_command", lambda _: lambda _: seen.append(json.loads(spent.read_bytes())) or 2)
    assert study("one", *only("later")) == 1
    assert seen[0]["seconds"] > 0


def test_beginnings_are_common_only_where_all_before_is(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    focus = {"kind": "focus", "duration": 0.3, "unit": "share", "drop": 0.3}
    learn, review = {"kind": "learn", "duration": 0.4, "unit": "share"}, {"kind": "review", "unit": "share"}
    schedules = {
        "a": [learn, focus, {**review, "duration": 0.3}],
        "b": [learn, {**focus, "drop": 0.4}, {**review, "duration": 0.3}],
        "c": [learn, focus, {**review, "duration": 0.1}, {**focus, "duration": 0.1}, {**review, "duration": 0.1}],
        "d": [{**learn, "duration": 0.2}, {**review, "duration": 0.8}],
        "once": [{**learn, "copies": "once"}, {**review, "duration": 0.6}],
        "same": [{**learn, "copies": "once"}, {**focus, "duration": 0.6}],
        "elsewhere": [{**learn, "copies": "once"}, {**review, "duration": 0.6}],
        "longer": [{**learn, "copies": "once", "duration": 0.6}, {**review, "duration": 0.4}],
    }
    content["arms"] = {name: {"settings": {"lfr_schedule": schedule}} for name, schedule in schedules.items()}
    blocks = lay_out_blocks(tiny_study(corpus), tmp_path)
    for name in list(schedules)[4:]:
        file = tmp_path / f"{'other' if name == 'elsewhere' else 'copies'}.npy"
        np.save(file, np.zeros(blocks, np.uint32))
        content["arms"][name]["settings"]["lfr_scores"] = [f"copies={file}"]
    assert blocks % 8  # a step that padding fills up is no step of a longer phase
    epoch = {"kind": "learn", "duration": 1, "unit": "epochs"}
    for name, second in (("padded", {"kind": "review"}), ("quite", {"kind": "focus", "drop": 0.3})):
        content["arms"][name] = {"length": "schedule", "settings": {"lfr_schedule": [epoch, epoch | second]}}
    content["arms"]["uniform"] = {"settings": {"lfr_schedule": "uniform"}}
    content["arms"]["warmed"] = {"settings": {"lfr_schedule": "uniform", "lr_warmup_iters": 2}}
    content["seeds"] = [1]
    layout = lay_out_study(read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / "out")
    steps = layout.runs["toy.S.cosine.uniform.s1"].steps
    rows = [
        (round(one.steps / steps, 2), "".join(name.split(".")[3][0] for name in one.runs))
        for one in find_beginnings(layout.runs.values(), tmp_path / "out").values()
    ]
    assert sorted(rows) == [(0.19, "abcdu"), (0.4, "abcu"), (0.4, "os"), (0.71, "ac")]
    keys = find_beginnings(layout.runs.values(), tmp_path / "out")
    np.save(tmp_path / "copies.npy", np.ones(blocks, np.uint32))
    layout = lay_out_study(read_study(tmp_path / "study.yaml"), tmp_path / "out")
    others = find_beginnings(layout.runs.values(), tmp_path / "out")
    assert len(keys.keys() & others.keys()) == 3, "what was trained with other numbers is no beginning of these runs"


def lay_out_blocks(content: dict[str, Any], folder: Path) -> int:
    layout = lay_out_study(read_study(write_study(folder / "plain.yaml", content)), folder / "out")
    return layout.runs["toy.S.cosine.uniform.s1"].plan.n_blocks
