"""A tiny run on text, and transformers' model with its weights in fp64."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "model"))
from hf_weights import hf_model, to_hf

from megatron_lfr.cli import main
from megatron_lfr.evaluation.trained import TrainedModel, load_trained

WORDS = ["sun", "rain", "snow", "wind", "falls", "shines", "today", "again", "on", "the", "hills", "é"]
SEQ = 32


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with checkpoints at 10 and 20 and evaluations there, on two domains of text in bytes."""
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
        *("--save", str(folder / "run")),
    ]
    assert main(["train", *train]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def trained(run: Path) -> TrainedModel:
    return load_trained(run)


class Oracle:
    """The same weights in transformers' LlamaForCausalLM, in fp64, one text at a time and without padding."""

    def __init__(self, trained: TrainedModel) -> None:
        weights = {name.removeprefix("model."): t.full_tensor() for name, t in trained.engine.weights().items()}
        config = trained.model.config
        self._model = hf_model(config)
        self._model.load_state_dict(to_hf(weights, config), strict=False)
        self._model.tie_weights()
        self._model.double().eval()

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """After each token, the log-probabilities of all: fp64 [len(tokens), vocabulary]."""
        return self._model(input_ids=torch.tensor([list(tokens)])).logits[0].log_softmax(-1)


@pytest.fixture(scope="session")
def oracle(trained: TrainedModel) -> Oracle:
    return Oracle(trained)
