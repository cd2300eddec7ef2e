"""`megatron-lfr study`: its flags, the table of what it would run, and what it says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from megatron_lfr.fileio import check_can_be_folder
from megatron_lfr.output import print_table
from megatron_lfr.study.definition import Study, read_study
from megatron_lfr.study.layout import Layout, PlannedRun, lay_out_study
from megatron_lfr.study.page import sentences, write_report
from megatron_lfr.study.pilot import PilotConfig, advice, prepare
from megatron_lfr.study.results import load_results
from megatron_lfr.study.runner import choose, find_forks, needed_steps, run_study, runs_to_train
from megatron_lfr.study.schedule import Ended
from megatron_lfr.study.statistics import require_scipy
from megatron_lfr.study.stored import read_results
from megatron_lfr.study.summary import summarize


@dataclass(frozen=True)
class StudyConfig:
    """Compare ways of choosing data at equal compute: train and evaluate every arm of STUDY.yaml, and write one page.

    A run that has a result is not run again, and a run that was stopped goes on: give the same command once more.
    `megatron-lfr study --pilot` writes such a study of a corpus of yours, and runs it; --pilot --help has its flags.
    """

    study: Annotated[Path, tyro.conf.Positional]
    """The YAML file that describes the study (docs/study.md). Paths in it are relative to the present folder."""
    output: Path | None = None
    """Folder for runs, results and the page; by default named as the study, in the present folder."""
    jobs: int | None = None
    """Runs side by side; by default one for each GPU, else as many as the cores allow."""
    threads: int = 1
    """Threads of each run on a CPU."""
    only: list[str] = field(default_factory=list)
    """Patterns of names of runs (as of files: * and ?); only those that fit one are run."""
    dry_run: bool = False
    """Print the runs, their compute and the estimated time, and run nothing."""
    report_only: bool = False
    """Write the page and tables of the results that there are, and run nothing."""

    def validate(self) -> None:
        """ValueError names the flag and the legal values."""
        for flag, value in (("--jobs", self.jobs), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value}: must be at least 1")
        if self.dry_run and self.report_only:
            raise ValueError("give one of --dry-run and --report-only")


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr study`. Returns 0 where all runs are done, 1 where one has failed."""
    if "--pilot" in argv:
        return _pilot([word for word in argv if word != "--pilot"])
    config = tyro.cli(StudyConfig, args=list(argv), prog="megatron-lfr study")
    config.validate()
    require_scipy()
    sys.path.insert(0, "")  # as of its runs, which `python -m` starts: both find functions of the present folder
    study = read_study(config.study)
    output = config.output or Path(config.study.stem)
    check_can_be_folder("--output", output)
    layout = lay_out_study(study, output)
    runs = choose(layout, config.only)
    environments = _environments(config)
    if config.dry_run:
        _print_plan(layout, output, runs, len(environments))
        return 0
    ended = [] if config.report_only else run_study(study, layout, output, runs, environments)
    return _report(study, layout, output, ended)


def _pilot(argv: Sequence[str]) -> int:
    """Ask what choosing data is worth on a corpus; returns as `main`."""
    config = tyro.cli(PilotConfig, args=list(argv), prog="megatron-lfr study --pilot")
    require_scipy()
    study = read_study(prepare(config))
    layout = lay_out_study(study, config.output)
    environments = [{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}] * config.jobs
    ended = run_study(study, layout, config.output, choose(layout, []), environments)
    return _report(study, layout, config.output, ended, advice)


def _report(
    study: Study,
    layout: Layout,
    output: Path,
    ended: Sequence[Ended],
    advise: Callable[[dict[str, Any]], str] | None = None,
) -> int:
    """Write the page, print what it says and what was not done. Returns the exit code.

    advise: what to do, of the figures of a study all of whose runs are done.
    """
    failed = [end for end in ended if end.code]
    results = load_results(study, layout, output)
    if not results.runs:
        print(f"{output}: no run is done yet")
    else:
        summary = summarize(results)
        if advise is not None and not summary["open_runs"]:
            summary["to_do"] = advise(summary)
        print(f"report: {write_report(summary, output)}")
        print("\n".join(sentences(summary)))
    for end in failed:
        print(f"not done: {end.task.name} ({end.task.log})")
    return 1 if failed else 0


def _environments(config: StudyConfig) -> list[dict[str, str]]:
    """Return the environment of each process side by side: a GPU each where there are GPUs, else some threads each."""
    import torch

    threads = {"OMP_NUM_THREADS": str(config.threads)}
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(gpus)]
        jobs = config.jobs or gpus
        return [{**threads, "CUDA_VISIBLE_DEVICES": names[number % gpus]} for number in range(jobs)]
    jobs = config.jobs or max(1, len(os.sched_getaffinity(0)) // config.threads)
    return [threads] * jobs


def _print_plan(layout: Layout, output: Path, runs: Sequence[PlannedRun], jobs: int) -> None:
    done = read_results(layout, output)
    open_runs = runs_to_train(runs, done)
    speed = _speed(layout, done)
    rows = []
    for run in runs:
        compute = run.compute
        seconds = "-" if speed is None else _duration(run.flops / speed)
        rows.append(
            [
                run.name,
                "done" if run.digest in done else "open" if run in open_runs else "shared",
                f"{run.steps:,}",
                *(f"{value:,.0f}" for value in (compute.training, compute.rescoring, compute.preparation)),
                f"{compute.total / compute.budget:.4f}",
                seconds,
            ]
        )
    head = ["run", "", "steps", "training", "rescoring", "preparation", "of budget", "time"]
    print_table(head, rows, "Runs; compute in forward_backward tokens of the run's model", ["run", ""])
    steps = needed_steps(layout, open_runs)
    for step in steps:
        print(f"before them: {step.key}: {step.costs.flops:.3g} FLOP")
    saved = 0.0
    for beginning, first, members, flops in find_forks(layout, output, open_runs).savings():
        print(f"trained once: {beginning.key}: steps {first + 1:,} to {beginning.steps:,} of {members} runs")
        saved += flops
    if saved:
        print(f"that saves {saved:.3g} FLOP; each run counts as if it had trained all of its steps")
    open_flops = sum((run.compute.training + run.compute.rescoring) * run.token_flops for run in open_runs) - saved
    open_flops += sum(step.costs.flops for step in steps)
    if speed is None:
        print(f"{open_flops:.3g} FLOP; no run is done yet that would say how long that takes")
    else:
        print(f"{open_flops:.3g} FLOP; about {_duration(open_flops / speed / jobs)} in all, {jobs} side by side")


def _speed(layout: Layout, done: Mapping[str, dict[str, Any]]) -> float | None:
    """Return the FLOPs a second of the runs that are done, as they trained; None where none is. done: their results, by
    digest."""
    runs = {run.digest: run for run in layout.runs.values()}
    seconds = sum(float(result["train_seconds"]) for result in done.values())
    computed = {key: result["compute"]["training"] + result["compute"]["rescoring"] for key, result in done.items()}
    flops = sum(float(tokens) * runs[key].token_flops for key, tokens in computed.items())
    return flops / seconds if seconds else None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes else f"{seconds:.0f} s"
