"""Four versions of a model while data arrive: from scratch, continually, and by path switching (arXiv 2410.04103).

    python examples/versions/run.py OUTPUT [--steps T] [--seed S]

The corpus is that of examples/demo, cut in four: into random parts of one mixture, and into its domains, which arrive
one after the other. Each version adds T steps. From scratch trains version i for i·T steps on all data so far;
continual goes on from version i - 1 for T steps on the new data, with a cosine of its own; path switching has one main
path at the peak rate, which `megatron-lfr extend` gives the new data, and a branch of 0.6 T steps for each version.
Replay mixes a quarter of old blocks into the new data. What the commands print is in OUTPUT/log.txt; results are in
OUTPUT/results.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.cli import main as megatron_lfr
from megatron_lfr.lfr.main_path import MainPath
from megatron_lfr.output import print_table
from megatron_lfr.run_folder import RunFolder

VERSIONS, BRANCH_SHARE, REPLAY = 4, 0.6, 0.25
HELD_OUT = 16_000
"""Bytes, and up to a document more, of each domain that no version is trained on."""
STOPPED = 75
BYTES_PER_STEP = 2 * 128


@dataclass(frozen=True)
class Workshop:
    """Where all runs are, and with which settings they are made."""

    folder: Path
    path: MainPath
    seed: int

    def command(self, *words: str, codes: Iterable[int] = (0,)) -> None:
        """Run `megatron-lfr` and append what it prints to log.txt. SystemExit where it fails."""
        with (self.folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            print("$ megatron-lfr", *words, flush=True)
            code = megatron_lfr(list(words))
        if code not in codes:
            raise SystemExit(f"megatron-lfr {' '.join(words)} ended with {code}; see {self.folder / 'log.txt'}")

    def train(self, save: Path, *words: str, codes: Iterable[int] = (0,)) -> None:
        """Train, or continue, a run."""
        config = Path(__file__).with_name("versions.yaml")
        self.command(
            *("train", "--config", str(config), "--seed", str(self.seed), *words, "--save", str(save)), codes=codes
        )

    def evaluate(self, run: Path, held_out: list[str]) -> dict[str, float]:
        """Return the loss of a run on what is held out, of all and by domain."""
        file = run / "held_out.json"
        if not file.exists():
            words = ["--data-path", *held_out, "--json", str(file), "--batch-size", "16"]
            self.command("evaluate", "--run", str(run), *words)
        corpus = json.loads(file.read_text())["corpus"]
        return {"all": corpus["loss"], **{name: one["loss"] for name, one in corpus["domains"].items()}}


def from_scratch(work: Workshop, folder: Path, prefixes: list[str]) -> list[Path]:
    """Train each version on all data so far."""
    runs = []
    for version in range(1, VERSIONS + 1):
        runs.append(folder / f"scratch{version}")
        length = ["--train-iters", str(work.path.ends_after(version))]
        work.train(runs[-1], "--data-path", *prefixes[:version], *length)
    return runs


def continual(work: Workshop, folder: Path, prefixes: list[str], first: Path, replay: float) -> list[Path]:
    """Train each version after the first from the one before, on the new data."""
    runs = [first]
    for version in range(2, VERSIONS + 1):
        runs.append(folder / f"continual{version}")
        *old, new = prefixes[:version]
        data = [new] if not replay else [word for prefix in old for word in (str(replay / len(old)), prefix)]
        data += [str(1 - replay), new] if replay else []
        start = ["--finetune", "--load", str(runs[-2]), "--train-iters", str(work.path.ends[0])]
        work.train(runs[-1], "--data-path", *data, *start)
    return runs


def path_switching(work: Workshop, folder: Path, prefixes: list[str], replay: float) -> list[Path]:
    """Train a main path at the peak rate, and a branch of it for each version."""
    path, trunk, runs = work.path, folder / "main", []
    for version in range(1, VERSIONS + 1):
        if version > 1:
            more = ["--train-iters", f"+{path.ends[0]}", "--replay", str(replay)]
            work.command("extend", "--run", str(trunk), "--data-path", *prefixes[:version], *more)
        settings = ["--config", str(trunk / "config.yaml")] if version > 1 else []
        keep = ["--lr-decay-style", "constant", "--branch-share", str(BRANCH_SHARE)]
        length = ["--data-path", prefixes[0], "--train-iters", str(path.ends[0])] if version == 1 else []
        if version < VERSIONS:
            work.train(trunk, *settings, *keep, *length)
        else:  # what comes after the last branch point, no version needs
            work.train(trunk, *settings, *keep, "--exit-interval", str(path.end), codes=(STOPPED,))
        runs.append(folder / f"version{version}")
        how = ["--version", str(version), "--lr-decay-style", "cosine"]
        work.command("branch", "--from", str(trunk), *how, "--save", str(runs[-1]))
        work.command("train", "--config", str(runs[-1] / "config.yaml"))
    return runs


def make_corpora(folder: Path, steps: int, seed: int) -> dict[str, list[str]]:
    """Write the corpora, and return the prefixes of the random parts, of the domains, and of what is held out."""
    kilobytes = math.ceil((HELD_OUT + 6_000 + 1.05 * steps * BYTES_PER_STEP) / 1000)  # documents have up to 6 kB
    corpus, maker = folder / "corpus.jsonl", Path(__file__).parents[1] / "demo" / "make_corpus.py"
    words = [sys.executable, str(maker), str(corpus), "--kilobytes-per-domain", str(kilobytes)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(row["domain"] for row in rows))
    choose = random.Random(seed)
    choose.shuffle(rows)
    held: list[dict[str, str]] = []
    kept: list[dict[str, str]] = []
    for name in names:
        of_domain = [row for row in rows if row["domain"] == name]
        size = 0
        for row in of_domain:
            (held if size < HELD_OUT else kept).append(row)
            size += len(row["text"].encode())
    choose.shuffle(kept)
    parts = [{"domain": f"part{i % VERSIONS + 1}", "text": row["text"]} for i, row in enumerate(kept)]
    prefixes = {}
    for kind, documents in (("mixture", parts), ("domains", kept), ("held_out", held)):
        file = folder / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
        domains = sorted({row["domain"] for row in documents})
        prefixes[kind] = [f"{folder}/{kind}_{name}_text_document" for name in domains]
    return prefixes


def train_all(work: Workshop, prefixes: dict[str, list[str]]) -> dict[str, dict[str, list[Path]]]:
    """Train all versions in all ways: run folders by how the data arrive, and by way."""
    runs: dict[str, dict[str, list[Path]]] = {}
    for kind, replay in (("mixture", 0.0), ("domains", 0.0), ("domains, replay", REPLAY)):
        folder, corpora = work.folder / kind.replace(", ", "_"), prefixes[kind.partition(",")[0]]
        scratch = runs["domains"]["from scratch"] if replay else from_scratch(work, folder, corpora)
        runs[kind] = {
            "from scratch": scratch,
            "continual": continual(work, folder, corpora, scratch[0], replay),
            "path switching": path_switching(work, folder, corpora, replay),
        }
    return runs


def trained_steps(runs: list[Path]) -> int:
    """Return the steps that all runs took, each one once: a branch has those of its parent before it leaves."""
    parents = [RunFolder(run).parent for run in runs]
    folders = dict.fromkeys([*runs, *(Path(parent.folder) for parent in parents if parent is not None)])
    return sum(map(steps_since_the_parent, folders))


def steps_since_the_parent(folder: Path) -> int:
    """Return the steps that a run took itself."""
    run = RunFolder(folder)
    first = 0 if run.parent is None else run.parent.step
    return sum(row["event"] == "train" and row["step"] > first for row in run.events())


def main() -> int:
    """Make the corpora, train, evaluate, and print a table for each way in which data arrive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder for all runs")
    parser.add_argument("--steps", type=int, default=100, help="steps that each version adds (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights, orders and parts (default: 1)")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    path = MainPath.of(VERSIONS * args.steps, VERSIONS, BRANCH_SHARE)
    work = Workshop(args.output, path, args.seed)
    prefixes = make_corpora(args.output, args.steps, args.seed)
    for kind in prefixes:
        given = ["--input", f"{args.output}/{kind}.jsonl", "--output-prefix", f"{args.output}/{kind}"]
        work.command("preprocess", *given, "--tokenizer", "bytes", "--domain-key", "domain")
    results: dict[str, Any] = {"steps": args.steps, "seed": args.seed, "branch_steps": path.branches[0], "arrivals": {}}
    for kind, ways in train_all(work, prefixes).items():
        results["arrivals"][kind] = {
            way: {
                "steps": trained_steps(runs),
                "versions": [work.evaluate(run, prefixes["held_out"]) for run in runs],
            }
            for way, runs in ways.items()
        }
        print_losses(kind, results["arrivals"][kind])
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


def print_losses(kind: str, ways: dict[str, Any]) -> None:
    """Print the held-out losses of all versions, by domain."""
    domains = list(next(iter(ways.values()))["versions"][0])
    rows = [
        [f"version {version + 1}", f"{way} ({one['steps']} steps)", *(f"{losses[name]:.4f}" for name in domains)]
        for version in range(VERSIONS)
        for way, one in ways.items()
        for losses in [one["versions"][version]]
    ]
    print_table(["", "way", *domains], rows, f"Held-out loss, nats a byte: {kind}")


if __name__ == "__main__":
    sys.exit(main())
