"""Kills random ranks of a run at random moments, starts it again each time, and compares with a run left alone.

    python tools/kill_ranks.py [--kills 50] [--nproc-per-node 2] [--seed 0] [--engine deepspeed] [-- flags of a layout]

Each time, torchrun must have ended by itself within --limit seconds of the kill, naming the rank; every other start
saves asynchronously. At the end, losses, journal, orders and weights must
have the same bits. Without flags, the layout is tensor parallelism; with --engine deepspeed, ZeRO-3.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from parity_matrix import read_run, run_flags, write_corpus

LAYOUTS = {
    "native": ["--tensor-model-parallel-size", "2"],
    "deepspeed": [
        "--deepspeed",
        "--deepspeed-config",
        str(Path(__file__).parents[1] / "examples/deepspeed/zero3.json"),
    ],
}


def start(arguments: list[str], ranks: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*command, "-m", "megatron_lfr", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of the ranks that a launcher has started so far."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"megatron_lfr" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def kill_one(process: subprocess.Popen[str], ranks: int, rng: random.Random, longest: float) -> bool:
    """Kill a rank between the moment all are there and `longest` seconds later; False where the run ended first."""
    while len(workers(process)) < ranks:
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    victim = rng.choice(workers(process))
    moment = time.monotonic() + rng.uniform(0, longest)
    while time.monotonic() < moment:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--nproc-per-node", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=15.0, help="seconds from a start to the latest kill")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds within which the others must have stopped")
    parser.add_argument("--train-epochs", default="60")
    parser.add_argument("--engine", choices=list(LAYOUTS), default="native")
    parser.add_argument("layout", nargs="*")
    args = parser.parse_args()
    layout = args.layout or LAYOUTS[args.engine]
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prefixes = write_corpus(folder)

        def arguments(name: str) -> list[str]:
            more = ["--lfr-schedule", "lfr", "--train-epochs", args.train_epochs, "--save-interval", "3"]
            return [*run_flags(prefixes, folder / name), *more, *layout]

        alone = start(arguments("alone"), args.nproc_per_node)
        out, _ = alone.communicate()
        if alone.returncode:
            print(out)
            return 1
        kills, named, ends, finished = 0, 0, [], False
        while not finished:
            asynchronous = ["--async-save"] if kills % 2 else []
            process = start([*arguments("killed"), *asynchronous], args.nproc_per_node)
            if kills < args.kills and kill_one(process, args.nproc_per_node, rng, args.longest):
                kills += 1
            killed_at = time.monotonic()
            try:
                out, _ = process.communicate(timeout=args.limit if kills < args.kills else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                print(f"HANG after kill {kills}:\n{process.communicate()[0]}")
                return 1
            finished = process.returncode == 0
            if not finished:
                ends.append(time.monotonic() - killed_at)
                named += "stopped answering" in out or "(SIGKILL)" in out
                at = re.findall(r"continuing .* at step (\d+)", out)
                began = f"had gone on from step {at[0]}" if at else "was still starting"
                print(f"kill {kills}: {began}, stopped in {ends[-1]:.1f} s", flush=True)
        one, two = read_run(folder / "alone"), read_run(folder / "killed")
        same = one.orders == two.orders and np.array_equal(one.journal, two.journal)
        same = same and np.array_equal(one.steps, two.steps)
        same = same and all(weight.equal(two.weights[name]) for name, weight in one.weights.items())
        print(
            f"{kills} kills over {len(one.steps)} steps: the rank named {named} times, all ranks gone after "
            f"{statistics.median(ends):.1f} s (median), {max(ends):.1f} s (longest); "
            f"{'the same bits' if same else 'OTHER RESULTS'}"
        )
    return 0 if same and named == kills else 1


if __name__ == "__main__":
    sys.exit(main())
