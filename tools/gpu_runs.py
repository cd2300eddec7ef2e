"""Compares short trainings by the command with others that must give the same losses, for tools/gpu_check.sh.

    python tools/gpu_runs.py CHECK [--json OUT.json] [--folder FOLDER]

On a GPU, 20 steps of 5M parameters, against the same on a CPU where devices are compared; without one, a toy on the
CPU, which tries the checks themselves. The exit code is 1 where losses are too far apart or a run fails, 3 where a
check needs a GPU and there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter

Figures = dict[str, Any]
STOPPED, NEEDS_GPU = 75, 3
GPU_SIZES = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 8 --num-query-groups 4 --ffn-hidden-size 704 "
    "--seq-length 256 --max-position-embeddings 256 --micro-batch-size 4 --global-batch-size 8"
)
TOY_SIZES = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 64 "
    "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 4 --global-batch-size 8"
)
RESCORED = (
    "[{kind: learn, duration: 6, unit: steps}, {kind: focus, duration: 6, unit: steps, drop: 0.5, score: rescored}, "
    "{kind: review, duration: 4, unit: steps}]"
)


class CheckError(Exception):
    """A run failed, or its losses are too far from another's."""


class NeedsGpuError(Exception):
    """Nothing can be checked without a GPU."""


@dataclass(frozen=True)
class Lab:
    """Where runs are made, on which corpus and device."""

    folder: Path
    on_gpu: bool

    def flags(self, steps: int) -> list[str]:
        """Return the flags that all runs share."""
        prefixes = [str(prefix) for prefix in make_corpus(self.folder, 4096 * (16 if self.on_gpu else 1))]
        schedule = f"[{{kind: learn, duration: {steps}, unit: steps}}]"
        return [
            *("--data-path", *prefixes, "--split", "100,0,0", "--tokenizer-model", "bytes"),
            *("--vocab-size", "4096" if self.on_gpu else "300", "--make-vocab-size-divisible-by", "1"),
            *("--lr", "1e-3", "--log-interval", "1", "--init-method-std", "0.05"),
            *(GPU_SIZES if self.on_gpu else TOY_SIZES).split(),
            *("--lfr-schedule", schedule),
        ]

    def start(self, name: str, flags: list[str], device: str = "", launcher: tuple[str, ...] = ()) -> Any:
        """Start a run into the folder `name`; `device` "cpu" hides the GPU from it."""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        command = [sys.executable, *(launcher or ()), "-m", "megatron_lfr", "train", *flags]
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [*command, "--save", str(self.folder / name)], env=environment, stdout=log, stderr=log
            )

    def finish(self, name: str, process: Any, code: int = 0) -> None:
        if (actual := process.wait()) != code:
            tail = (self.folder / f"{name}.log").read_text().splitlines()[-12:]
            raise CheckError("\n".join([f"run {name!r}: exit code {actual}, expected {code}", *tail]))

    def run(self, name: str, flags: list[str], device: str = "", launcher: tuple[str, ...] = ()) -> None:
        self.finish(name, self.start(name, flags, device, launcher))

    def steps(self, name: str) -> list[dict[str, Any]]:
        """Return what was logged of each step so far; of a step that was taken twice, the last."""
        path = self.folder / name / "metrics.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return list({event["step"]: event for event in events if event["event"] == "train"}.values())

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


def make_corpus(folder: Path, tokens: int) -> list[Path]:
    """Write two domains of documents, counting up and noise, of bytes; token 256 ends each."""
    rng = np.random.default_rng(11)
    prefixes = [folder / f"{domain}_text_document" for domain in ("easy", "hard")]
    for prefix in prefixes:
        if prefix.with_suffix(".idx").exists():
            continue
        with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
            for start in range(0, tokens, 64):
                counted = (start // 7 + np.arange(63)) % 60
                body = counted if prefix == prefixes[0] else rng.integers(0, 60, 63)
                writer.add_document(np.append(body, 256).astype(np.uint16))
    return prefixes


def differ(lab: Lab, one: str, other: str, bar: float) -> Figures:
    """Return the largest difference of two runs' losses; CheckError beyond `bar`."""
    a, b = ([step["last_loss"] for step in lab.steps(name)] for name in (one, other))
    if len(a) != len(b) or not a:
        raise CheckError(f"{one!r} logged {len(a)} steps, {other!r} {len(b)}")
    largest = max(abs(x - y) for x, y in zip(a, b, strict=True))
    if not largest <= bar:
        raise CheckError(f"losses of {one!r} and {other!r} differ by {largest:.2e}, more than {bar:.0e}: {a} and {b}")
    return {f"{one} / {other}": largest, "bar": bar, "steps": len(a), "last loss": a[-1]}


def losses(lab: Lab) -> Figures:
    """Compare fp32 and bf16 on the GPU with fp32 on the CPU."""
    flags = lab.flags(20 if lab.on_gpu else 4)
    lab.run("cpu", flags, "cpu")
    lab.run("fp32", flags)
    lab.run("bf16", [*flags, "--bf16"])
    return {"fp32": differ(lab, "fp32", "cpu", 1e-3), "bf16": differ(lab, "bf16", "cpu", 5e-2)}


def resume(lab: Lab) -> Figures:
    """Compare a run that SIGTERM stops, and its rest, with one that nothing stops."""
    flags = lab.flags(400 if lab.on_gpu else 60)
    lab.run("whole", flags)
    process = lab.start("stopped", flags)
    while process.poll() is None and len(lab.steps("stopped")) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    lab.finish("stopped", process, STOPPED)
    stopped = len(lab.steps("stopped"))
    lab.run("stopped", flags)
    return {"stopped after": stopped, **differ(lab, "stopped", "whole", 5e-2 if lab.on_gpu else 0.0)}


def compiled(lab: Lab) -> Figures:
    """Compare bf16 with and without --compile."""
    if not lab.on_gpu:
        raise NeedsGpuError("compiling for a CPU is tested elsewhere")
    flags = [*lab.flags(20), "--bf16"]
    lab.run("eager", flags)
    lab.run("compiled", [*flags, "--compile"])
    figures = differ(lab, "compiled", "eager", 5e-2)
    times = {name: [step["time"]["step_ms"] for step in lab.steps(name)][5:] for name in ("eager", "compiled")}
    return figures | {f"{name} step_ms": statistics.median(values) for name, values in times.items()}


def documents(lab: Lab) -> Figures:
    """Compare attention inside of documents with grouped queries: the default with the CPU's, with --compile, and
    with a dense mask; and what each run prints of its attention."""
    flags = [*lab.flags(20 if lab.on_gpu else 4), "--reset-attention-mask", "--reset-position-ids"]
    runs: dict[str, list[str]] = {"fp32": [], "bf16": ["--bf16"]}
    if lab.on_gpu:
        runs |= {"compiled": ["--bf16", "--compile"], "dense": ["--bf16", "--attention-backend", "sdpa"]}
    lab.run("cpu", flags, "cpu")
    figures: Figures = {}
    for name, more in runs.items():
        lab.run(name, [*flags, *more])
        kernel = "flex_attention" if lab.on_gpu and name != "dense" else "scaled_dot_product_attention"
        figures[name] = differ(lab, name, "cpu", 1e-3 if name == "fp32" else 5e-2)
        figures[name]["attention"] = attention_line(lab, name, kernel)
        figures[name]["step_ms"] = statistics.median(step["time"]["step_ms"] for step in lab.steps(name)[3:])
    return figures


def attention_line(lab: Lab, name: str, kernel: str) -> str:
    """Return what a run prints of its attention at its start; CheckError where that is not `kernel`."""
    said = [line for line in lab.log(name).splitlines() if line.startswith("attention: ")]
    if len(said) != 1 or kernel not in said[0]:
        raise CheckError(f"run {name!r}: expected one line on attention by {kernel}, got {said}")
    return said[0]


def rescoring(lab: Lab) -> Figures:
    """Compare a Focus on rescored losses on the GPU and the CPU."""
    flags = [*lab.flags(16), "--lfr-schedule", RESCORED]
    lab.run("cpu", flags, "cpu")
    lab.run("gpu", flags)
    return differ(lab, "gpu", "cpu", 5e-2)


def torchrun(lab: Lab) -> Figures:
    """Compare one rank that torchrun starts, on NCCL where there is a GPU, with a process without ranks."""
    flags = lab.flags(20 if lab.on_gpu else 4)
    lab.run("plain", flags)
    backend = ["--distributed-backend", "nccl" if lab.on_gpu else "gloo"]
    lab.run("torchrun", [*flags, *backend], launcher=("-m", "torch.distributed.run", "--nproc-per-node=1"))
    return differ(lab, "torchrun", "plain", 1e-2 if lab.on_gpu else 1e-5)


def async_save(lab: Lab) -> Figures:
    """Compare saves while training goes on, and a resume from one, with a run that saves once, at its end."""
    flags = lab.flags(40 if lab.on_gpu else 12)
    lab.run("whole", flags)
    saving = [*flags, "--async-save", "--save-interval", "5"]
    process = lab.start("async", [*saving, "--exit-interval", "10"])
    lab.finish("async", process, STOPPED)
    lab.run("async", saving)
    return differ(lab, "async", "whole", 5e-2 if lab.on_gpu else 0.0)


def syncs(lab: Lab) -> Figures:
    """Count how often the host waits for the GPU in two training steps, and where."""
    if not lab.on_gpu:
        raise NeedsGpuError("there is nothing to wait for")
    import benchmark_training as training

    arguments = training.parse(["--model-preset", "120M", "--bf16", "--global-batch-size", "8", "--seq-length", "512"])
    config = training.model_config(arguments)
    engine = training.make_engine(config, arguments)
    training.measure(engine, config, arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for step in range(2):
            batch = training.random_batch(arguments.global_batch_size, arguments.seq_length, arguments.vocab_size, step)
            engine.train_step(batch, 1e-4).wait()
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {"waits in two steps": len(waits), "places": {line: waits.count(line) for line in sorted(set(waits))}}


def memory(lab: Lab) -> Figures:
    """Compare the most memory that two steps take with `megatron-lfr estimate`."""
    sizes = ["--model-preset", "300M", "--vocab-size", "32000", "--seq-length", "2048", "--micro-batch-size", "4"]
    sizes += ["--global-batch-size", "8", "--bf16"]
    command = [
        sys.executable,
        "-m",
        "megatron_lfr",
        "estimate",
        *sizes,
        "--train-iters",
        "10",
        "--blocks",
        "1000",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"estimate: {done.stderr.strip()[-600:]}")
    estimated = json.loads(done.stdout)
    if not lab.on_gpu:
        raise NeedsGpuError("a CPU's memory is not counted; the estimate itself was made")
    import benchmark_training as training

    arguments = training.parse([*sizes, "--warmup", "1", "--steps", "1"])
    config = training.model_config(arguments)
    training.measure(training.make_engine(config, arguments), config, arguments)
    peak, planned = torch.cuda.max_memory_allocated(), estimated["memory"][0]["peak"]
    return {"peak / estimate": peak / planned, "peak bytes": peak, "estimate bytes": planned}


CHECKS: dict[str, Callable[[Lab], Figures]] = {
    "losses": losses,
    "resume": resume,
    "compiled": compiled,
    "documents": documents,
    "rescoring": rescoring,
    "torchrun": torchrun,
    "async_save": async_save,
    "syncs": syncs,
    "memory": memory,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="folder in which the runs are kept (default: a temporary one)")
    args = parser.parse_args(arguments)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="gpu_runs_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        figures = CHECKS[args.check](Lab(folder, torch.cuda.is_available()))
    except NeedsGpuError as error:
        print(f"needs a GPU: {error}")
        return NEEDS_GPU
    except CheckError as error:
        print(error)
        return 1
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
