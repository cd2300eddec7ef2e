"""Fine-tune a converted model on instructions: `uniform` and `lfr`, by AdamW and by LoRA-RITE, with three seeds.

    python examples/instructions/run.py OUTPUT [--epochs E] [--records N] [--seeds 1 2 3]

The base is a Llama of 0.3M parameters, trained once on the text of examples/demo, written as a Hugging Face folder and
converted back. The instructions are those of make_instructions.py; the loss counts their responses alone. All runs
train adapters for the same number of tokens. One table gives the held-out loss of the responses, the mean over the
tasks; another the differences of arms, paired by seed, with a 95 % interval of Student's t. What the commands print is
in OUTPUT/log.txt; results are in OUTPUT/results.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.cli import main as megatron_lfr
from megatron_lfr.output import print_table
from megatron_lfr.study.statistics import paired_t

HERE = Path(__file__).parent
BASE = ["--train-epochs", "1"]
FINE_TUNING = [
    *("--lora-rank", "8", "--lora-alpha", "16", "--lora-target", "all", "--finetune"),
    *("--seq-length", "64", "--micro-batch-size", "16", "--global-batch-size", "16", "--split", "100,0,0"),
    *("--lr-decay-style", "cosine", "--lr-warmup-iters", "10", "--log-interval", "1"),
    *("--reset-attention-mask", "--reset-position-ids", "--adam-beta2", "0.95"),
]
OPTIMIZERS = {
    "adamw": ["--lr", "5e-3"],
    "lora-rite": ["--optimizer", "lora-rite", "--clip-grad", "0", "--lr", "5e-3"],
}
SCHEDULES = ("uniform", "lfr")

Arm = tuple[str, str]
"""Optimizer and schedule."""
ARMS: list[Arm] = list(itertools.product(OPTIMIZERS, SCHEDULES))
DIFFERENCES: list[tuple[str, Arm, Arm]] = [
    *((f"lfr - uniform, {name}", (name, "lfr"), (name, "uniform")) for name in OPTIMIZERS),
    *((f"lora-rite - adamw, {name}", ("lora-rite", name), ("adamw", name)) for name in SCHEDULES),
]
"""What is compared: a name, and two arms, of which the second's loss is taken from the first's."""


@dataclass(frozen=True)
class Workshop:
    """Where all runs are, and how long they train."""

    folder: Path
    epochs: float

    def command(self, *words: str | Path) -> None:
        """Run `megatron-lfr` and append what it prints to log.txt. SystemExit where it fails."""
        given = list(map(str, words))
        with (self.folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            print("$ megatron-lfr", *given, flush=True)
            code = megatron_lfr(given)
        if code != 0:
            raise SystemExit(f"megatron-lfr {' '.join(given)} ended with {code}; see {self.folder / 'log.txt'}")

    def make_base(self) -> Path:
        """Train the base, write it as a Hugging Face folder, and return the run folder that is made of that."""
        corpus, tokenizer = self.folder / "text.jsonl", self.folder / "tokenizer.json"
        words = [sys.executable, str(HERE.parent / "demo" / "make_corpus.py"), str(corpus)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        self.command("tokenizer", "--input", corpus, "--output", tokenizer, "--vocab-size", "512")
        self.command("preprocess", "--input", corpus, "--output-prefix", self.folder / "text", "--tokenizer", tokenizer)
        data = ["--data-path", self.folder / "text_text_document", "--tokenizer-model", tokenizer]
        trained, exported, base = (self.folder / name for name in ("pretrained", "exported", "base"))
        self.command("train", "--config", HERE / "base.yaml", *BASE, *data, "--save", trained)
        self.command("convert", "to-hf", "--run", trained, "--output", exported)
        self.command("convert", "from-hf", "--input", exported, "--output", base)
        return base

    def make_instructions(self, records: int) -> dict[str, list[str]]:
        """Write the instructions as corpora with loss masks; return the prefixes to train on, and those held out."""
        words = [sys.executable, str(HERE / "make_instructions.py"), str(self.folder), "--records", str(records)]
        subprocess.run(words, check=True)
        lines = (self.folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        tasks = dict.fromkeys(json.loads(line)["task"] for line in lines)
        for name in ("train", "held_out"):
            given = ["--input", self.folder / f"{name}.jsonl", "--output-prefix", self.folder / name]
            tokenizer = ["--tokenizer", self.folder / "exported"]
            self.command("preprocess", "--sft", *given, *tokenizer, "--domain-key", "task")
        return {
            name: [f"{self.folder}/{name}_{task}_text_document" for task in tasks] for name in ("train", "held_out")
        }

    def fine_tune(self, base: Path, arm: Arm, seed: int, prefixes: dict[str, list[str]]) -> dict[str, Any]:
        """Train one run and evaluate it. Returns its tokens, its held-out loss (nats a token of a response), the mean
        over the tasks, and that of each task."""
        optimizer, schedule = arm
        run = self.folder / f"{optimizer}.{schedule}.{seed}"
        data = ["--data-path", *prefixes["train"], "--train-epochs", str(self.epochs)]
        how = [*OPTIMIZERS[optimizer], "--lfr-schedule", schedule, "--seed", str(seed)]
        self.command(
            *("train", "--config", base / "config.yaml", "--load", base, *FINE_TUNING, *data, *how, "--save", run)
        )
        losses = self.evaluate(run, prefixes["held_out"])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tokens = max(row["consumed_tokens"] for row in rows if row["event"] == "train")
        return {"tokens": tokens, "loss": statistics.fmean(losses.values()), "tasks": losses}

    def evaluate(self, run: Path, held_out: list[str]) -> dict[str, float]:
        """Return the held-out loss of each task."""
        file = self.folder / f"{run.name}.json"
        self.command("evaluate", "--run", run, "--data-path", *held_out, "--json", file, "--batch-size", "16")
        return {task: one["loss"] for task, one in json.loads(file.read_text())["corpus"]["domains"].items()}


def main() -> int:
    """Make base and instructions, fine-tune, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder for all runs")
    parser.add_argument("--epochs", type=float, default=3.0, help="epochs over the instructions (default: 3)")
    parser.add_argument("--records", type=int, default=4000, help="instructions to train on (default: 4000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of the runs (default: 1 2 3)")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    began, work = time.monotonic(), Workshop(args.output, args.epochs)
    base, prefixes = work.make_base(), work.make_instructions(args.records)
    runs = {
        "|".join(arm): {str(seed): work.fine_tune(base, arm, seed, prefixes) for seed in args.seeds} for arm in ARMS
    }
    results = {"epochs": args.epochs, "records": args.records, "seconds": time.monotonic() - began, "arms": runs}
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_losses(runs)
    print_differences(runs)
    return 0


def print_losses(runs: dict[str, Any]) -> None:
    """Print the held-out losses of all arms: mean and standard deviation over the seeds, and the mean of each task."""
    rows = []
    for arm, of_seed in runs.items():
        values = list(of_seed.values())
        losses = [one["loss"] for one in values]
        spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        tasks = [f"{statistics.fmean(one['tasks'][task] for one in values):.4f}" for task in values[0]["tasks"]]
        rows.append([*arm.split("|"), f"{values[0]['tokens']:,}", f"{statistics.fmean(losses):.4f}", spread, *tasks])
    head = ["optimizer", "schedule", "tokens", "loss", "sd", *values[0]["tasks"]]
    print_table(head, rows, "Held-out loss, nats a token of a response; the mean over tasks", left=head[:2])


def print_differences(runs: dict[str, Any]) -> None:
    """Print the differences of arms, paired by seed."""
    rows = []
    for name, one, other in DIFFERENCES:
        pairs = zip(runs["|".join(one)].values(), runs["|".join(other)].values(), strict=True)
        difference = paired_t([a["loss"] - b["loss"] for a, b in pairs])
        interval = "" if difference.low is None else f"{difference.low:+.4f} to {difference.high:+.4f}"
        rows.append([name, f"{difference.mean:+.4f}", interval])
    print_table(["difference of held-out losses", "mean", "95 % interval"], rows, "Paired by seed")


if __name__ == "__main__":
    sys.exit(main())
