"""Runs a study's layout: a process for each step and each run that has no result yet."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lfr.commonness.clean import KEPT
from megatron_lfr.commonness.junk import RULE
from megatron_lfr.config.keys import as_flag
from megatron_lfr.fileio import lock_file, write_atomic
from megatron_lfr.study.beginnings import Beginning, Forks, choose_forks, find_beginnings
from megatron_lfr.study.definition import Study
from megatron_lfr.study.layout import Layout, PlannedRun
from megatron_lfr.study.schedule import STOPPED, Ended, Task, ending_on_sigterm, run_tasks
from megatron_lfr.study.steps import PlannedStep
from megatron_lfr.study.stored import JOB, check_begun, names_of, result_file, share_results


def choose(layout: Layout, only: Sequence[str]) -> list[PlannedRun]:
    """Return the runs whose name fits one of the patterns, all where there is none; ValueError where none fits."""
    runs = [run for run in layout.runs.values() if not only or any(fnmatch.fnmatchcase(run.name, p) for p in only)]
    if not runs:
        raise ValueError(
            f"--only {' '.join(only)}: fits none of the {len(layout.runs)} runs, as {next(iter(layout.runs))}"
        )
    return runs


def run_study(
    study: Study, layout: Layout, output: Path, runs: Sequence[PlannedRun], environments: Sequence[dict[str, str]]
) -> list[Ended]:
    """Do what is not done yet of these runs and the steps that they need, a process in each of the environments at a
    time. Returns how each process ended. ValueError where another process runs the study in this folder, and where one
    of the runs was begun with other settings."""
    (output / "results").mkdir(parents=True, exist_ok=True)
    with lock_file(output / "lock", f"--output {output}: another process is running a study in this folder"):
        open_runs = runs_to_train(runs, share_results(layout, output))
        check_begun(open_runs)
        wanted, forks = needed_steps(layout, open_runs), find_forks(layout, output, open_runs)
        tasks = [
            Task(
                f"prepare {step.key}",
                _job(output, step.folder, _step_job(layout, step)),
                step.folder / "log.txt",
                tuple(f"prepare {need}" for need in step.needs if need in {other.key for other in wanted}),
            )
            for step in wanted
        ]
        keys, beginnings = {step.key for step in wanted}, forks.open()
        tasks += [
            Task(
                f"beginning {one.key}",
                _job(output, one.folder, _beginning_job(layout, one, forks)),
                one.folder / "log.txt",
                _before(one.needs, keys, forks.shorter[one.key], beginnings),
            )
            for one in beginnings
        ]
        tasks += [
            Task(
                run.name,
                _job(output, run.folder, _run_job(study, layout, output, run, forks.runs.get(run.name))),
                run.folder / "log.txt",
                _before(run.needs, keys, forks.runs.get(run.name), beginnings),
            )
            for run in open_runs
        ]
        shared = f"; {len(forks.runs)} fork from a beginning that is trained once" if forks.runs else ""
        print(
            f"{len(runs)} runs: {len(runs) - len(open_runs)} are done; {len(environments)} processes side by side"
            f"{shared}"
        )
        with ending_on_sigterm():
            ended = run_tasks(tasks, len(environments), environments, _Progress(len(tasks)))
        share_results(layout, output)
        return ended


def runs_to_train(runs: Sequence[PlannedRun], done: Collection[str]) -> list[PlannedRun]:
    """Return the runs whose digest is not among those that are done; of several that are the same but for their names,
    the first."""
    first = {run.digest: run for run in reversed(runs) if run.digest not in done}
    return [run for run in runs if first.get(run.digest) is run]


def find_forks(layout: Layout, output: Path, open_runs: Sequence[PlannedRun]) -> Forks:
    """Find which of the runs without a result fork from a common beginning. One that has begun goes on as it is."""
    new = [run for run in open_runs if not (run.folder / "run").exists()]
    return choose_forks(find_beginnings(layout.runs.values(), output), new)


def _before(
    needs: Sequence[str], steps: Collection[str], source: Beginning | None, beginnings: Sequence[Beginning]
) -> tuple[str, ...]:
    """Return the names of the tasks that a run waits for: steps, and the beginning that it forks from."""
    forked = [f"beginning {source.key}"] if source in beginnings and source is not None else []
    return *(f"prepare {need}" for need in needs if need in steps), *forked


def needed_steps(layout: Layout, runs: Sequence[PlannedRun]) -> list[PlannedStep]:
    """Return the steps that these runs need and that have no result, each after those that it needs itself."""
    keys = {need for run in runs for need in run.needs}
    return [step for key, step in layout.steps.items() if key in keys and not step_result(step).exists()]


def step_result(step: PlannedStep) -> Path:
    """Return the JSON of a step, which exists when the step is done."""
    return step.folder / "step.json"


class _Progress:
    """Prints a line as each process ends."""

    def __init__(self, total: int) -> None:
        self.total, self.ended = total, 0

    def __call__(self, end: Ended) -> None:
        self.ended += 1
        how = "done"
        if end.because is not None:
            how = f"not run: {end.because} has failed"
        elif end.code == STOPPED:
            how = "stopped, and saved"
        elif end.code:
            how = f"failed with code {end.code}, see {end.task.log}"
        print(f"{self.ended}/{self.total} {end.task.name}: {how}", flush=True)


def _job(output: Path, folder: Path, job: dict[str, Any]) -> tuple[str, ...]:
    """Write the file of a process, and return its command line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JOB
    write_atomic(path, json.dumps({"parent": os.getpid(), "folder": str(folder), **job}, indent=1) + "\n")
    return "-m", "megatron_lfr.study.job", str(path)


def _fork(source: Beginning | None) -> dict[str, Any]:
    if source is None:
        return {}
    return {"fork": {"run": str(source.run), "step": source.steps, "result": str(source.result)}}


def _beginning_job(layout: Layout, beginning: Beginning, forks: Forks) -> dict[str, Any]:
    return {
        "kind": "beginning",
        "result": str(beginning.result),
        "train": beginning.settings,
        "stop_after": beginning.steps,
        "cleaned": any(layout.steps[key].step.kind == "clean" for key in beginning.needs),
        **_fork(forks.shorter[beginning.key]),
        "describes": {"format": 1, "steps": beginning.steps, "runs": beginning.runs},
    }


def _run_job(study: Study, layout: Layout, output: Path, run: PlannedRun, source: Beginning | None) -> dict[str, Any]:
    folder = run.folder
    words = [
        *("--run", str(folder / "run"), "--split", "all", "--data-path", *study.held_out),
        *("--per-block", str(folder / "held_out.npy"), "--json", str(folder / "held_out.json")),
        *(("--tasks", *map(str, study.tasks)) if study.tasks else ()),
    ]
    labels: dict[str, Any] | None = None
    steps = [layout.steps[key] for key in run.needs]
    cleaned = [step for step in steps if step.step.kind == "clean"]
    if run.trained_on.labels is not None:
        labels = {**asdict(run.trained_on.labels), "file": str(run.trained_on.labels.file)}
        if cleaned:
            labels["kept"] = str(cleaned[-1].output / KEPT)
    return {
        "kind": "run",
        "result": str(result_file(output, run.name)),
        "train": run.settings,
        **_fork(source),
        "cleaned": bool(cleaned),
        "commands": [["evaluate", words]],
        "steps": [str(step_result(step)) for step in steps],
        "labels": labels,
        "describes": {
            "format": 1,
            **names_of(run),
            **{key: getattr(run, key) for key in ("digest", "training", "settings", "steps", "token_flops")},
            "budget": run.compute.budget,
            "given_flops": run.given_flops,
            "junk_rule": RULE if any(step.step.kind == "commonness" for step in steps) else None,
        },
    }


def _step_job(layout: Layout, step: PlannedStep) -> dict[str, Any]:
    job: dict[str, Any] = {
        "kind": step.step.kind,
        "result": str(step_result(step)),
        "describes": {
            "format": 1,
            "step": step.key,
            "settings": step.settings,
            "token_flops": step.costs.token_flops,
        },
        "seq_length": step.seq_length,
    }
    if step.step.kind == "train":
        return {**job, "train": {**step.settings, "save": str(step.output)}}
    source = layout.steps[step.needs[0]] if step.needs else None
    if step.step.kind == "evaluate":
        assert source is not None
        words = ["--run", str(source.output), *_flags(step.settings), "--per-block", str(step.output)]
        return {**job, "commands": [["evaluate", [*words, "--json", str(step.folder / "evaluation.json")]]]}
    if step.step.kind == "commonness":
        return {**job, "commands": [["commonness", [*_flags(step.settings), "--output", str(step.output)]]]}
    assert source is not None
    paths = {"data_path": list(step.corpus.data_path), "commonness": str(source.output), "output": str(step.output)}
    return {**job, **paths, "rules": step.step.settings}


def _flags(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in as_flag(key, value)]
