"""Every family against transformers: logits, gradients, and conversion both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from megatron_lfr.cli import main
from megatron_lfr.huggingface.config import from_hf_config
from megatron_lfr.model import Decoder
from support.families import MODELS, make_model
from support.hf_runs import stored_weights
from support.hf_weights import load_hf, to_hf


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_equal_transformers(name: str) -> None:
    theirs = make_model(name)
    config, _ = from_hf_config(theirs.config.to_dict())
    assert config.num_parameters() == sum(p.numel() for p in theirs.parameters())
    ours = Decoder(config, seed=1)
    load_hf(ours, theirs.state_dict())
    tokens = torch.randint(0, 120, (2, 61), generator=torch.Generator().manual_seed(3))
    tokens, labels = tokens[:, :-1], tokens[:, 1:]

    hf_logits = theirs(input_ids=tokens).logits
    logits = ours.logits(ours.hidden_states(tokens).flatten(0, 1)).view_as(hf_logits)
    assert (logits - hf_logits).abs().max() <= 1e-5

    F.cross_entropy(hf_logits.flatten(0, 1), labels.flatten()).backward()
    ours(tokens, labels, torch.full(labels.shape, 1 / labels.numel()))[0].backward()
    gradients = to_hf({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, config)
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).abs().max() <= min(1e-5, 1e-3 * expected[key].abs().max() + 1e-8), key
