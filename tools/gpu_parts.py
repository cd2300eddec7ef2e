"""Runs the parts of tools/gpu_check.sh, keeps what they found, and prints one table.

    python tools/gpu_parts.py check|measure OUT [--only NAME,...] [--seconds 460] [--workers 5]

Parts that are not timed run side by side. A part that outlasts its limit is interrupted (Ctrl-C, so that it says where
it was), and one for which no time is left is not begun. OUT/results.json is written anew after every part, OUT/logs.txt
has what each said, OUT/table.txt the table. The exit code is 1 where a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_table import render

PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "--confcutdir=tests/kernels", "-p", "no:cacheprovider"]
NEEDS_GPU = 3
"""Exit code of a part that cannot do anything without one."""
SECONDS = 460.0
"""For all parts together."""
GRACE_SECONDS = 10
"""From an interrupt to the kill."""


@dataclass(frozen=True)
class Part:
    """One command. `{json}` in it is the file for its figures."""

    name: str
    limit: int
    """Seconds."""
    command: list[str]
    without_gpu: list[str] | str
    """The command, on smaller sizes, or why there is none."""
    alone: bool = False
    """It measures time: nothing may run beside it."""


def test(name: str, limit: int, *arguments: str) -> Part:
    return Part(name, limit, [*PYTEST, *arguments], "the suite runs these tests in Triton's interpreter")


def run_check(name: str, limit: int) -> Part:
    command = [PYTHON, "tools/gpu_runs.py", name, "--json", "{json}"]
    return Part(name, limit, command, command)


def tool(name: str, limit: int, script: str, flags: str, toy_flags: str | None) -> Part:
    start = [PYTHON, f"tools/{script}.py", "--json", "{json}"]
    toy = "it would take minutes on a CPU" if toy_flags is None else [*start, *toy_flags.split()]
    return Part(name, limit, [*start, *flags.split()], toy, alone=True)


def benchmark(flags: str) -> Part:
    """Make the part of the command itself: where the time of a step goes."""
    start = [PYTHON, "-m", "megatron_lfr", "benchmark", "--json", "{json}", "--micro-batch-size", "4", "--warmup", "3"]
    toy = "--model-preset demo --vocab-size 64 --seq-length 16 --steps 2 --traced-steps 1"
    return Part("benchmark", 80, [*start, *flags.split()], [*start, *toy.split()], alone=True)


TOY_KERNELS = "--rounds 1 --shapes 64x16x128"
TOY_LAYERS = "--model-preset demo --tokens 16 --rounds 1"
TOY_TRAINING = "--model-preset demo --vocab-size 64 --seq-length 16 --steps 1 --warmup 1 --profile"
BUILD = Part("build", 90, *2 * ([PYTHON, "setup.py", "-q", "build_ext", "--inplace"],), alone=True)
PARTS = {
    "check": [
        BUILD,
        # The longest first; what needs a GPU most before what the suite has shown elsewhere.
        test("gpu tests", 200, "tests/gpu"),
        test("kernel tests", 300, "tests/kernels/test_triton_kernels.py"),
        test("contract", 300, "tests/kernels/test_block_cross_entropy.py"),
        test("properties", 200, "tests/kernels/test_cross_entropy_properties.py"),
        test("layers", 60, "tests/model/test_elementwise.py"),
        Part("accuracy", 120, *2 * ([PYTHON, "tools/benchmark_kernels.py", "--accuracy", "--json", "{json}"],)),
        Part("registers", 200, *2 * ([*PYTEST, "tests/kernels/test_triton_compile.py"],)),
        *(run_check(name, 180) for name in ("losses", "documents", "rescoring", "resume", "async_save", "torchrun")),
        run_check("compiled", 240),
        run_check("syncs", 120),
        # Last, and with a process of its own: one of them reads where it must not, after which a GPU's process is lost.
        test("mutants", 300, "tests/kernels/test_cross_entropy_mutants.py"),
    ],
    "measure": [
        BUILD,
        # Of each vocabulary in a process of its own: what one peer's compiler takes or breaks, the other does not miss.
        tool("kernels 128256", 120, "benchmark_kernels", "--rounds 10 --shapes 8192x4096x128256", TOY_KERNELS),
        tool("kernels 32000", 100, "benchmark_kernels", "--rounds 10 --shapes 8192x4096x32000", TOY_KERNELS),
        tool("training", 50, "benchmark_training", "--bf16 --profile", TOY_TRAINING),
        tool("compiled training", 80, "benchmark_training", "--bf16 --compile", None),
        benchmark("--model-preset 1.1B --vocab-size 32000 --seq-length 2048 --global-batch-size 16 --bf16 --compile"),
        tool("layers", 60, "benchmark_layers", "", TOY_LAYERS),
        tool("profile", 40, "profile_kernels", "", "--shape 64x16x128"),
        Part("memory", 60, *2 * ([PYTHON, "tools/gpu_runs.py", "memory", "--json", "{json}"],), alone=True),
    ],
}  # fmt: skip


class Session:
    """Parts, what they have measured so far, and the time that is left."""

    def __init__(self, mode: str, out: Path, seconds: float, card: str) -> None:
        self.out, self.card, self._end = out, card, time.monotonic() + seconds
        self.results: dict[str, Any] = {"mode": mode, "card": card or f"no GPU ({platform.machine()})", "parts": {}}
        self._lock = threading.Lock()
        self._figures = Path(tempfile.mkdtemp(prefix="gpu_parts_"))
        out.mkdir(parents=True, exist_ok=True)
        (out / "logs.txt").write_text("")
        self._write()

    def run(self, parts: list[Part], workers: int) -> None:
        """Run all parts: first those before the first that may have company, then these side by side, then the rest."""
        group: list[Part] = []
        for part in [*parts, None]:
            if part is not None and not part.alone:
                group.append(part)
                continue
            with ThreadPoolExecutor(max(workers, 1)) as pool:
                list(pool.map(self._run_part, group))
            group = []
            if part is not None:
                self._run_part(part)

    def _run_part(self, part: Part) -> None:
        command = part.command if self.card else part.without_gpu
        left = self._end - time.monotonic()
        if isinstance(command, str):
            self._keep(part, "skipped", 0.0, f"no CUDA device: {command}", "")
        elif left < GRACE_SECONDS:
            self._keep(part, "skipped", 0.0, "no time left", "")
        else:
            self._start(part, command, min(part.limit, left))

    def _start(self, part: Part, command: list[str], limit: float) -> None:
        figures = self._figures / f"{part.name}.json"
        log = self._figures / f"{part.name}.log"
        began = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [str(figures) if word == "{json}" else word for word in command],
                stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            interrupted = not ends_within(process, limit)
        text = log.read_text(errors="replace")
        code = process.returncode
        state = "interrupted" if interrupted else {0: "passed", NEEDS_GPU: "skipped"}.get(code, "failed")
        why = f"after {limit:.0f} s" if interrupted else "" if code == 0 else last_line(text) or f"exit code {code}"
        self._keep(part, state, time.monotonic() - began, why, text, figures)

    def _keep(self, part: Part, state: str, seconds: float, why: str, log: str, figures: Path | None = None) -> None:
        entry: dict[str, Any] = {"state": state, "seconds": round(seconds, 1), "why": why}
        with contextlib.suppress(OSError, ValueError):  # none, or cut off while they were written
            entry["figures"] = json.loads(figures.read_text()) if figures is not None else {}
        with self._lock:
            self.results["parts"][part.name] = entry
            with (self.out / "logs.txt").open("a") as file:
                file.write(f"\n=== {part.name}: {state} {why}\n{log[-200_000:]}")
            self._write()
        print(f"{part.name:20s} {state:12s} {seconds:6.1f} s  {why}"[:160], flush=True)

    def _write(self) -> None:
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")


def ends_within(process: subprocess.Popen[Any], limit: float) -> bool:
    """Wait; past the limit, interrupt the process with all that it started, and at last kill it."""
    try:
        process.wait(limit)
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return False


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


def find_card() -> str:
    """Return the GPU's name; empty without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="names of the parts to run, separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="seconds for all parts together")
    parser.add_argument("--workers", type=int, default=5, help="number of parts that run side by side")
    args = parser.parse_args(arguments)
    known = {part.name: part for part in PARTS[args.mode]}
    names = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(known)}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored, in children too
    session = Session(args.mode, args.out, args.seconds, find_card())
    try:
        session.run([known[name] for name in names], args.workers)
    finally:
        table = render(session.results)
        (args.out / "table.txt").write_text(table)
        print(table, flush=True)
    return int(any(part["state"] in ("failed", "interrupted") for part in session.results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
