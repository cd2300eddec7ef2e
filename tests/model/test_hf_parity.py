"""The same logits and gradients as transformers' LlamaForCausalLM on the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from megatron_lfr.model import Decoder, ModelConfig
from support.hf_weights import hf_model, load_hf, to_hf

BASE = ModelConfig(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=160,
    vocab_size=200,
    make_vocab_size_divisible_by=64,
    max_position_embeddings=256,
)
CASES = {
    "one key a query, tied": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "grouped queries": {"num_query_groups": 2},
    "one key for all": {"num_query_groups": 1, "untie_embeddings_and_output_weights": True},
    "rope theta": {"rotary_base": 500000.0},
    "llama 3 scaling": {
        "use_rope_scaling": True,
        "rope_original_max_position_embeddings": 64,
        "rotary_base": 500000.0,
        "num_query_groups": 2,
    },
    "other scaling": {
        "use_rope_scaling": True,
        "rope_scaling_factor": 32.0,
        "rope_low_freq_factor": 2.0,
        "rope_high_freq_factor": 6.0,
        "rope_original_max_position_embeddings": 128,
    },
    "head size of its own": {"kv_channels": 24, "num_query_groups": 2},
    "norm epsilon": {"norm_epsilon": 1e-2},
}


def sample(config: ModelConfig, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    assert config.vocab_size is not None
    tokens = torch.randint(0, config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_transformers(case: str) -> None:
    torch.manual_seed(7)
    config = dataclasses.replace(BASE, **CASES[case])
    theirs = hf_model(config)
    ours = Decoder(config, seed=1)
    load_hf(ours, theirs.state_dict())
    tokens, labels = sample(config, 2, 200)

    hf_logits = theirs(input_ids=tokens).logits
    logits = F.linear(ours.hidden_states(tokens), ours.output_weight)[..., : config.vocab_size]
    assert (logits - hf_logits).abs().max() <= 1e-5

    hf_loss = F.cross_entropy(hf_logits.flatten(0, 1), labels.flatten())
    hf_loss.backward()
    loss, *_ = ours(tokens, labels, torch.full(labels.shape, 1 / labels.numel()))
    loss.backward()
    assert abs(loss.item() - hf_loss.item()) <= 1e-5
    gradients = to_hf({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, config)
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        size = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= min(1e-5, 1e-3 * size), name


def test_our_initial_weights_give_transformers_our_logits() -> None:
    config = dataclasses.replace(BASE, num_query_groups=2, untie_embeddings_and_output_weights=True)
    ours = Decoder(config, seed=5)
    theirs = hf_model(config)
    theirs.load_state_dict(to_hf(ours.state_dict(), config))
    tokens, _ = sample(config, 2, 100)
    logits = F.linear(ours.hidden_states(tokens), ours.output_weight)[..., : config.vocab_size]
    assert (logits - theirs(input_ids=tokens).logits).abs().max() <= 1e-5


def test_bfloat16_stays_near_and_its_gradients_are_fp32() -> None:
    torch.manual_seed(7)
    config = dataclasses.replace(BASE, num_query_groups=2)
    tokens, labels = sample(config, 2, 100)
    weight = torch.full(labels.shape, 1 / labels.numel())
    exact, rounded = Decoder(config, seed=5), Decoder(config, seed=5, compute_dtype=torch.bfloat16)
    assert rounded.hidden_states(tokens).dtype == torch.bfloat16
    losses = []
    for model in (exact, rounded):
        loss, *_ = model(tokens, labels, weight)
        loss.backward()
        losses.append(loss)
    assert losses[1].dtype == torch.float32
    assert 0 < (losses[0] - losses[1]).abs() < 2e-3
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert q.dtype == q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.05 * p.grad.norm(), name
