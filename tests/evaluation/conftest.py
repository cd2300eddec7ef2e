"""A tiny run on text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.cli import main
from megatron_lfr.evaluation.trained import TrainedModel, load_trained
from support.text_run_oracle import SEQ, WORDS, Oracle


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 20 steps on two domains of text in bytes, with checkpoints and evaluations at 10 and 20. The model caps its
    logits; its loss has all that no evaluation has."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(17)
    rows = [{"text": " ".join(rng.choice(WORDS[: 6 + 6 * (i % 2)], 30)), "domain": "ab"[i % 2]} for i in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prefix = str(folder / "toy")
    flags = ["--input", str(folder / "corpus.jsonl"), "--output-prefix", prefix, "--tokenizer", "bytes"]
    assert main(["preprocess", *flags, "--domain-key", "domain", "--workers", "1", "--no-progress"]) == 0
    train = [
        *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--num-query-groups", "2"),
        *("--ffn-hidden-size", "64", "--max-position-embeddings", "64", "--seq-length", str(SEQ)),
        *("--tokenizer-model", "bytes", "--data-path", f"{prefix}_a_text_document", f"{prefix}_b_text_document"),
        *("--split", "8,1,1", "--micro-batch-size", "4", "--global-batch-size", "8", "--lr", "3e-3"),
        *("--lfr-schedule", "uniform", "--train-iters", "20", "--save-interval", "10", "--eval-interval", "10"),
        *("--final-logit-softcapping", "1.5", "--z-loss-coeff", "0.01", "--label-smoothing", "0.1"),
        *("--save", str(folder / "run")),
    ]
    assert main(["train", *train]) == 0
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def _has_ranks(ranks_of_a_file: None) -> None:
    """Every file here loads models."""


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedModel:
    return load_trained(run)


@pytest.fixture(scope="module")
def oracle(trained: TrainedModel) -> Oracle:
    return Oracle(trained)
