"""The model by itself: documents, recomputation, initial weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lfr.model import Decoder, ModelConfig
from megatron_lfr.model.loss import LossConfig

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=50,
    make_vocab_size_divisible_by=16,
    max_position_embeddings=64,
)


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def larger_weights(model: Decoder) -> Decoder:
    """Weights large enough for attention to look at something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return model


@torch.no_grad()
def test_documents_do_not_see_each_other() -> None:
    model = larger_weights(Decoder(CONFIG, seed=1))
    lengths = [(5, 20, 7), (16, 1, 15)]
    documents = [[tokens_of(1, n, seed=10 * r + i) for i, n in enumerate(row)] for r, row in enumerate(lengths)]
    joined = torch.cat([torch.cat(row, 1) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ids = torch.stack([torch.cat([torch.full((n,), 3 + i) for i, n in enumerate(row)]) for row in lengths])
    hidden = model.hidden_states(joined, positions, ids)
    alone = torch.cat([torch.cat([model.hidden_states(d) for d in row], 1) for row in documents])
    torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-5)
    assert (model.hidden_states(joined, positions) - alone).abs().max() > 1e-2  # without the mask they do


@torch.no_grad()
def test_attention_is_causal() -> None:
    model = larger_weights(Decoder(CONFIG, seed=1))
    tokens = tokens_of(2, 30)
    changed = tokens.clone()
    changed[:, 17:] = (changed[:, 17:] + 1) % 50
    one, two = model.hidden_states(tokens), model.hidden_states(changed)
    torch.testing.assert_close(one[:, :17], two[:, :17], atol=1e-6, rtol=1e-6)
    assert (one[:, 17:] - two[:, 17:]).abs().amax(-1).min() > 1e-3


def test_positions_are_counted_from_zero_by_default() -> None:
    model = larger_weights(Decoder(CONFIG, seed=1))
    tokens = tokens_of(2, 30)
    positions = torch.arange(30).expand(2, -1)
    assert torch.equal(model.hidden_states(tokens), model.hidden_states(tokens, positions))
    assert not torch.allclose(model.hidden_states(tokens), model.hidden_states(tokens, 2 * positions), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_changes_no_bit(granularity: str, with_documents: bool, dtype: torch.dtype) -> None:
    tokens, labels = tokens_of(2, 30), tokens_of(2, 30, seed=1)
    ids = (torch.arange(30) // 11).expand(2, -1) if with_documents else None
    results, calls = [], []
    for chosen in (None, granularity):
        model = Decoder(CONFIG, seed=1, compute_dtype=dtype, recompute_granularity=chosen)  # type: ignore[arg-type]
        count = [0]
        for layer in model.layers.values():
            layer.attention_norm.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        loss, *stats = model(tokens, labels, torch.full((2, 30), 1 / 60), document_ids=ids)
        loss.backward()
        results.append([loss.detach(), *stats, *(p.grad for p in model.parameters())])
        calls.append(count[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert calls == [2, 4 if granularity == "full" else 2]  # norms run again only where layers do


def test_selective_recomputation_keeps_less() -> None:
    kept = []
    for granularity in (None, "selective", "full"):
        model = Decoder(CONFIG, seed=1, recompute_granularity=granularity)  # type: ignore[arg-type]
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.__setitem__(t.data_ptr(), t.numel()), t)[1],  # type: ignore[misc]
            lambda t: t,
        ):
            model.hidden_states(tokens_of(4, 60))
        kept.append(sum(sizes.values()))
    assert kept[0] > kept[1] > kept[2]


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, two, other = Decoder(CONFIG, seed=1), Decoder(CONFIG, seed=1), Decoder(CONFIG, seed=2)
    deeper = Decoder(dataclasses.replace(CONFIG, num_layers=3, make_vocab_size_divisible_by=64), seed=1)
    weights, deep = one.state_dict(), deeper.state_dict()
    for name, weight in weights.items():
        assert torch.equal(weight, two.state_dict()[name])
        if weight.ndim > 1:
            assert not torch.equal(weight, other.state_dict()[name])
    assert torch.equal(weights["layers.1.attention.qkv.weight"], deep["layers.1.attention.qkv.weight"])
    assert not torch.equal(weights["layers.0.attention.qkv.weight"], weights["layers.1.attention.qkv.weight"])
    assert torch.equal(weights["embedding.weight"][:50], deep["embedding.weight"][:50])


def test_spread_of_the_initial_weights() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=256, ffn_hidden_size=512, init_method_std=0.03)
    weights = Decoder(config, seed=1).state_dict()
    for name, expected in {
        "layers.0.attention.qkv.weight": 0.03,
        "layers.1.feed_forward.gate.weight": 0.03,
        "layers.0.feed_forward.up.weight": 0.03,
        "layers.0.attention.output.weight": 0.03 / 2,  # √(2 · 2 layers)
        "layers.1.feed_forward.down.weight": 0.03 / 2,
    }.items():
        assert weights[name].std().item() == pytest.approx(expected, rel=0.02)
        assert abs(weights[name].mean().item()) < 0.02 * expected
    assert torch.equal(weights["final_norm.weight"], torch.ones(256))


@pytest.mark.parametrize("untied", [False, True])
def test_padding_of_the_vocabulary_stays_zero(untied: bool) -> None:
    model = Decoder(dataclasses.replace(CONFIG, untie_embeddings_and_output_weights=untied), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tokens, labels = tokens_of(2, 30), tokens_of(2, 30, seed=1)
    before = model.output_weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels, torch.full((2, 30), 1 / 60))[0].backward()
        optimizer.step()
    assert model.output_weight.shape == (64, 32)
    assert not model.output_weight[50:].any()
    assert not torch.equal(model.output_weight[:50], before[:50])
    assert ("output.weight" in dict(model.named_parameters())) == untied


def test_training_lowers_the_loss() -> None:
    model = Decoder(CONFIG, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = (torch.arange(33) * 3 % 50).expand(4, -1)
    losses = []
    for _ in range(50):
        loss, nll_sum, _ = model(tokens[:, :-1], tokens[:, 1:], torch.full((4, 32), 1 / 128))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(3.9, abs=0.2)  # ln 50
    assert losses[-1] < 0.1
    assert nll_sum.sum().item() / 128 == pytest.approx(losses[-1], rel=1e-5)


def test_the_loss_is_plain_where_there_is_no_gradient() -> None:
    plain, model = Decoder(CONFIG, seed=1), Decoder(CONFIG, seed=1, loss=LossConfig(0.01, 0.1))
    inputs = tokens_of(2, 30), tokens_of(2, 30, seed=1), torch.full((2, 30), 1 / 60)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(plain(*inputs), model(*inputs), strict=True))
    (loss, *stats), (plain_loss, *plain_stats) = model(*inputs), plain(*inputs)
    assert loss > plain_loss + 0.1
    assert all(torch.equal(a, b) for a, b in zip(stats, plain_stats, strict=True))


@pytest.mark.parametrize("cap", [0.0, 1.0])
def test_logits_are_those_of_the_loss(cap: float) -> None:
    model = larger_weights(Decoder(dataclasses.replace(CONFIG, final_logit_softcapping=cap), seed=1))
    tokens, labels, everywhere = tokens_of(2, 30), tokens_of(2, 30, seed=1), torch.ones(2, 30, dtype=torch.bool)
    with torch.no_grad():
        hidden = model.hidden_states(tokens).flatten(0, 1)
        logits = (hidden.double() @ model.output_weight[: CONFIG.vocab_size].double().t()).view(2, 30, -1)
        expected = torch.tanh(logits) if cap else logits
        nll = F.cross_entropy(expected.transpose(1, 2), labels, reduction="none")
        torch.testing.assert_close(model.logits(hidden).double(), expected.flatten(0, 1), rtol=1e-5, atol=1e-6)
        _, nll_sum, _ = model(tokens, labels, torch.full((2, 30), 1 / 60))
        torch.testing.assert_close(nll_sum.double(), nll.sum(1), rtol=1e-5, atol=1e-6)
        scored, _ = model.score_next(tokens, labels, everywhere)
        torch.testing.assert_close(scored.double(), -nll.flatten(), rtol=1e-5, atol=1e-6)


def test_too_long_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens is longer than --max-position-embeddings 64"):
        Decoder(CONFIG, seed=1).hidden_states(tokens_of(1, 65))
