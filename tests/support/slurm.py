"""Slurm as a job's script sees it: sbatch, srun, scontrol, and what slurmd sends to the tasks of a step.

Tasks of all nodes run on this machine; the nodes are 127.0.0.1, 127.0.0.2 and so on. This file is also the program
that stands as `srun` and `scontrol` in a job's PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = "STUB_SLURM_FOLDER"


class Slurm:
    """A cluster in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in ("srun", "scontrol"):
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -I {Path(__file__).resolve()} {name} "$@"\n')
            program.chmod(0o755)

    def sbatch(
        self, script: Path, options: dict[str, str], arguments: list[str], before_limit: Callable[[], bool]
    ) -> tuple[int, str, int]:
        """Run a job to its end, and again where it asks for it. Returns (exit code, output of all starts, starts).

        options: override those of the script. before_limit: waits until the time of --signal has come; False if the job
        has ended by then.
        """
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)) | options
        environment = os.environ | self._environment(asked)
        output = self._folder / "output"
        starts = 0
        while True:
            (self._folder / "requeue").unlink(missing_ok=True)
            if starts:
                environment["SLURM_RESTART_COUNT"] = str(starts)
            with output.open("ab") as file:  # --open-mode=append
                job = subprocess.Popen(
                    ["bash", str(script), *arguments], cwd=self._folder, env=environment, stdout=file, stderr=file
                )
            starts += 1
            if starts == 1 and before_limit():
                name, _, seconds = asked["signal"].partition("@")
                assert int(seconds) > 0
                self.signal_tasks(signal.Signals[f"SIG{name}"])
            code = job.wait()
            if not (self._folder / "requeue").exists():
                return code, output.read_text(), starts
            assert "requeue" in asked, "scontrol requeue of a job without --requeue is refused"

    def signal_tasks(self, number: signal.Signals) -> None:
        """Send a signal to all tasks of the newest step, as slurmd does: to what srun has started, and not to what
        these have started in turn."""
        newest = max(self._folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for pid in json.loads(newest.read_text()):
            os.kill(pid, number)

    def commands(self) -> list[list[str]]:
        """Return what srun was given, in the order of the calls."""
        return [json.loads(line) for line in (self._folder / "calls").read_text().splitlines()]

    def _environment(self, asked: dict[str, str]) -> dict[str, str]:
        nodes, tasks = int(asked["nodes"]), int(asked["ntasks-per-node"])
        return {
            "PATH": f"{self._folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            FOLDER: str(self._folder),
            "SLURM_JOB_ID": str(os.getpid()),  # the port follows from it
            "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]",
            "SLURM_NNODES": str(nodes),
            "SLURM_NTASKS": str(nodes * tasks),
            "SLURM_NTASKS_PER_NODE": str(tasks),
            "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
            "SLURM_GPUS_ON_NODE": asked["gpus-per-node"],
            "SLURM_SUBMIT_DIR": str(self._folder),
            **{f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")},
        }


def srun(arguments: list[str]) -> int:
    """Start a step; what is not among the options here is refused, as srun refuses what it does not know."""
    parser = argparse.ArgumentParser("srun", allow_abbrev=False)
    parser.add_argument("--kill-on-bad-exit", type=int, default=0)
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--ntasks", type=int, default=int(os.environ["SLURM_NTASKS"]))
    parser.add_argument("--ntasks-per-node", type=int, default=int(os.environ["SLURM_NTASKS_PER_NODE"]))
    parser.add_argument("--container-image")  # pyxis
    parser.add_argument("--container-mounts")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    folder, nodes = Path(os.environ[FOLDER]), int(os.environ["SLURM_NNODES"])
    if options.ntasks > options.ntasks_per_node * nodes:
        sys.exit("srun: error: more tasks than --ntasks-per-node allows")
    step = len(list(folder.glob("step-*")))
    with (folder / "calls").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    tasks = []
    for rank in range(options.ntasks):
        node, local = divmod(rank, options.ntasks_per_node)
        task = {
            "SLURM_STEP_ID": step,
            "SLURM_STEPID": step,
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": local,
            "SLURM_NODEID": node,
            "SLURM_NTASKS": options.ntasks,
            "SLURM_STEP_NUM_TASKS": options.ntasks,
            "SLURM_STEP_NUM_NODES": nodes,
            "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
            "SLURMD_NODENAME": f"127.0.0.{node + 1}",
        }
        environment = os.environ | {name: str(value) for name, value in task.items()}
        tasks.append(subprocess.Popen(options.command, env=environment, start_new_session=True))
    aside = folder / f".step-{step}"
    aside.write_text(json.dumps([task.pid for task in tasks]))
    aside.rename(folder / f"step-{step}")
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        first, last = map(int, re.fullmatch(r"127\.0\.0\.\[(\d+)-(\d+)\]", arguments[2]).groups())  # type: ignore[union-attr]
        print("\n".join(f"127.0.0.{number}" for number in range(first, last + 1)))
        return 0
    if arguments == ["requeue", os.environ["SLURM_JOB_ID"]]:
        Path(os.environ[FOLDER], "requeue").touch()
        os.kill(os.getppid(), signal.SIGTERM)  # what is left of the job, its script, is asked to end
        return 0
    sys.exit(f"scontrol: error: {arguments}")


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
