"""The losses of a run of 50 steps: a tiny Llama in fp32, one rank, the preset lfr over two corpora."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lfr.cli import main
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter

STEPS = 50
STOP = 30
"""Steps of the stored run: within its second Review."""
STORED_RUN = Path(__file__).parents[1] / "golden" / "run_stopped_at_30"
STOPPED = 75
VOCAB = 64


def golden_run(folder: Path, start: Path | None = None) -> dict[str, Any]:
    """Train in `folder`, or go on there from a copy of the run `start`, and read the run's `losses_of`."""
    if start is not None:
        shutil.copytree(start, folder / "run")
    _train(folder, [], 0)
    return losses_of(folder / "run")


def store_run(target: Path, folder: Path) -> None:
    """Make `target` anew: the run, stopped after STOP steps. `folder`: for its corpus, and empty."""
    _train(folder, ["--exit-interval", str(STOP)], STOPPED)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / "run", target, ignore=shutil.ignore_patterns("tensorboard", "lock"))


def losses_of(run: Path) -> dict[str, Any]:
    """Of each step the loss, the gradient's norm and the learning rate, of each evaluation the loss, of each phase the
    hash of its order and the recorded losses of its blocks, in the order of training. Nine digits, which tell all fp32
    numbers apart."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    journal = [np.load(path) for path in sorted((run / "journal").glob("phase_???.npy"))]
    return {
        "order_hashes": [row["order_hash"] for row in rows if row["event"] == "phase"],
        "loss": _rounded([row["last_loss"] for row in steps]),
        "grad_norm": _rounded([row["grad_norm"] for row in steps]),
        "lr": _rounded([row["lr"] for row in steps]),
        "evaluation": _rounded([row["loss"] for row in rows if row["event"] == "evaluation"]),
        **{f"block_losses of phase {phase}": _rounded(losses) for phase, losses in enumerate(journal)},
    }


def golden_flags(corpus: list[str]) -> list[str]:
    """Return the command line of the run, without its folder."""
    return [
        *("--data-path", *corpus, "--split", "90,10,0", "--seq-length", "16", "--max-position-embeddings", "16"),
        *("--vocab-size", str(VOCAB), "--num-layers", "2", "--hidden-size", "16", "--ffn-hidden-size", "32"),
        *("--num-attention-heads", "4", "--num-query-groups", "2", "--seed", "5"),
        *("--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", str(STEPS), "--lfr-schedule", "lfr"),
        *("--lr", "1e-2", "--min-lr", "1e-3", "--lr-warmup-iters", "5", "--clip-grad", "0.7", "--log-interval", "1"),
    ]


def write_corpus(folder: Path) -> list[str]:
    """Two prefixes of 40 documents: tokens that count up, and noise. From integers alone."""
    prefixes = []
    for name in ("easy", "hard"):
        prefix = folder / f"{name}_text_document"
        with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
            for document in range(40):
                positions = np.arange(25 + 7 * document % 36)
                hashed = (positions * 40 + document) * 2654435761 % 2**32 >> 16
                tokens = (document + positions) % 60 if name == "easy" else hashed % 60
                writer.add_document(np.append(tokens, VOCAB - 1).astype(np.uint16))
        prefixes.append(str(prefix))
    return prefixes


def _train(folder: Path, flags: list[str], code: int) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ended = main(["train", *golden_flags(write_corpus(folder)), "--save", str(folder / "run"), *flags])
    assert ended == code, printed.getvalue()


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.9g}") for value in values]
