"""One process of a study: `python -m megatron_lfr.study.job JOB.json` runs commands of the product, one after another,
and writes the one JSON that says that the job is done.

The commands run in one process, so that PyTorch is imported once; each is called as the command line calls it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_lfr.fileio import describe, write_atomic
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.run_folder.settings import dump_yaml
from megatron_lfr.study.schedule import STOPPED

_PR_SET_PDEATHSIG = 1
_CLOCKS = ("seconds", "cpu_seconds")


def main(argv: Sequence[str]) -> int:
    """Run the job in the file `argv[0]`. Returns 0 when it is done, else the exit code of the command that is not."""
    job = json.loads(Path(argv[0]).read_bytes())
    _end_with_parent(job["parent"])
    try:
        return run_job(job)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"megatron-lfr study: error: {describe(error)}", file=sys.stderr)
        return 2


def run_job(job: dict[str, Any]) -> int:
    """Run a job's commands, collect its result, and write it to `job["result"]`, aside first."""
    spent = _Spent(job)
    try:
        code = _work(job, spent)
        if not code:
            result = {**job["describes"], **_collect(job), **spent.so_far()}
            write_atomic(Path(job["result"]), json.dumps(result, indent=1, allow_nan=False) + "\n")
        return code
    finally:
        spent.write()


def _work(job: dict[str, Any], spent: _Spent) -> int:
    """Train, and run the commands after it. Returns 0, or the exit code of what has not ended well."""
    if job.get("cleaned"):  # a prefix of which too little is left is not there
        job["train"]["data_path"] = [p for p in job["train"]["data_path"] if Path(f"{p}.idx").exists()]
    code = 0
    if job.get("train"):
        code = _train(job, spent)
        spent.write()  # what comes after training ends at once when it is stopped
    for command, words in job.get("commands", []):
        code = code or _command(command)(words)
    return code


class _Spent:
    """What a job has taken, seconds by the clock and of CPU: this process, those before it that trained the same run
    and could say so (not one that was killed outright), and what a run that forks would have taken for its beginning.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._file = Path(job["folder"]) / "spent.json"
        self._before = dict.fromkeys(_CLOCKS, 0.0)
        self._started = time.monotonic()
        if job.get("train") and Path(job["train"]["save"]).exists() and self._file.exists():
            self.add(json.loads(self._file.read_bytes()))

    def add(self, more: dict[str, float]) -> None:
        """Count what another process has taken."""
        self._before = {clock: self._before[clock] + more[clock] for clock in _CLOCKS}

    def so_far(self) -> dict[str, float]:
        """Return the seconds up to now, by clock."""
        now = dict(zip(_CLOCKS, (time.monotonic() - self._started, _cpu_seconds()), strict=True))
        return {clock: self._before[clock] + now[clock] for clock in _CLOCKS}

    def write(self) -> None:
        """Keep the seconds up to now for a process that goes on with the job."""
        write_atomic(self._file, json.dumps(self.so_far()) + "\n")


def _collect(job: dict[str, Any]) -> dict[str, Any]:
    from megatron_lfr.study.collect import collect, collect_step

    if job["kind"] == "beginning":
        return {}
    if job["kind"] == "clean":
        from megatron_lfr.commonness.clean import clean

        shutil.rmtree(job["output"], ignore_errors=True)  # of an attempt that was killed before it was noted as done
        return clean(Path(job["commonness"]), job["data_path"], Path(job["output"]), job["rules"])
    return collect(job) if job["kind"] == "run" else collect_step(job)


def _train(job: dict[str, Any], spent: _Spent) -> int:
    """Train the run, or continue it; to its end, or to the step `job["stop_after"]`."""
    from megatron_lfr.training.run import main as train

    folder, run, stop = Path(job["folder"]), Path(job["train"]["save"]), job.get("stop_after")
    write_atomic(folder / "settings.yaml", dump_yaml(job["train"]))
    wait_until_free(run / "lock")
    if job.get("fork") and not run.exists():
        spent.add(json.loads(Path(job["fork"]["result"]).read_bytes()))
        spent.write()
        _fork(job["fork"], job["train"])
    if stop is not None and _step(run) == stop:
        return 0
    code = train(["--config", str(folder / "settings.yaml")])
    return 0 if code == STOPPED and stop is not None and _step(run) == stop else code


def _fork(fork: dict[str, Any], settings: dict[str, Any]) -> None:
    """Make a run of these settings that goes on from a step of the one that has trained its beginning."""
    from megatron_lfr.config.training import LFRConfig
    from megatron_lfr.versions.branch import create_branch
    from megatron_lfr.versions.changes import Changed

    schedule, scores = settings.get("lfr_schedule", LFRConfig.lfr_schedule), settings.get("lfr_scores")
    changed = Changed(
        train_iters=settings["train_iters"],
        lfr_schedule=schedule if isinstance(schedule, str) else json.dumps(schedule),
        lfr_scores=[scores] if isinstance(scores, str) else scores,
    )
    create_branch(Path(fork["run"]), fork["step"], Path(settings["save"]), changed)


def _step(run: Path) -> int | None:
    """Return the step of a run's newest checkpoint; None where there is none."""
    checkpoint = RunFolder(run).find_checkpoint()
    return None if checkpoint is None else checkpoint.iteration


def _command(name: str) -> Callable[[Sequence[str]], int]:
    if name == "evaluate":
        from megatron_lfr.evaluation.command import main as evaluate

        return lambda words: evaluate(words, 1)
    from megatron_lfr.commonness.command import main as commonness

    return commonness


def wait_until_free(lock: Path) -> None:
    """Wait until no process holds a run's lock: one that a killed study has left may still be saving."""
    if lock.exists():
        with lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def _end_with_parent(parent: int) -> None:
    """Let this process get SIGTERM when the study's ends, however that ends. On Linux; elsewhere it trains on."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signal.SIGTERM)


def _cpu_seconds() -> float:
    """Return the seconds of CPU that this process and those it has waited for have used, all threads together."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
