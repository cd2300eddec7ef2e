"""transformers' model with a run's weights in fp64, and what the run's texts are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lfr.evaluation.trained import TrainedModel
from support.hf_weights import hf_model, to_hf

WORDS = ["sun", "rain", "snow", "wind", "falls", "shines", "today", "again", "on", "the", "hills", "é"]
SEQ = 32


class Oracle:
    """The same weights in transformers' LlamaForCausalLM, its logits capped, in fp64, one text at a time and without
    padding."""

    def __init__(self, trained: TrainedModel) -> None:
        weights = {name.removeprefix("model."): t.full_tensor() for name, t in trained.engine.weights().items()}
        config = trained.model.config
        self._model, self._cap = hf_model(config), config.final_logit_softcapping
        self._model.load_state_dict(to_hf(weights, config), strict=False)
        self._model.tie_weights()
        self._model.double().eval()

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """After each token, the log-probabilities of all: fp64 [len(tokens), vocabulary]."""
        logits: Tensor = self._model(input_ids=torch.tensor([list(tokens)])).logits[0]
        capped = self._cap * torch.tanh(logits / self._cap) if self._cap else logits
        return capped.log_softmax(-1)
