"""Dropout's masks: SplitMix64's numbers, the rates, and nothing without keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lfr.model import Decoder, ModelConfig
from megatron_lfr.model.dropout import DropoutConfig, draw, draw_dropped, draw_sample_keys, drop
from support.dropout_oracle import splitmix

PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
"""What SplitMix64's reference program (https://prng.di.unimi.it/splitmix64.c) prints from the seed 1234567."""
CPU = torch.device("cpu")
SMALL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50, max_position_embeddings=64)


def test_numbers_are_the_published_ones() -> None:
    seed = torch.tensor(1234567)
    for numbers in (draw(seed, torch.arange(5)), torch.stack([draw(seed, index) for index in range(5)])):
        assert [number % 2**64 for number in numbers.tolist()] == PUBLISHED
    assert splitmix(1234567, range(5)).tolist() == PUBLISHED


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate(rate: float) -> None:
    keys = draw_sample_keys(1, 0, slice(0, 500), CPU)
    dropped = draw_dropped(keys, 2000, rate)
    bound = 5 * (rate * (1 - rate) / dropped.numel()) ** 0.5
    assert abs(dropped.double().mean() - rate) <= bound
    # neither rows nor columns stand out, nor does an element follow from its neighbour
    for share, count in ((dropped.double().mean(0), 500), (dropped.double().mean(1), 2000)):
        assert (share - rate).abs().max() <= 6 * (rate * (1 - rate) / count) ** 0.5
    for both in (dropped[:, 1:] & dropped[:, :-1], dropped[1:] & dropped[:-1]):
        assert abs(both.double().mean() - rate**2) <= 10 * (rate**2 / both.numel()) ** 0.5


def test_masks_differ_by_seed_step_and_row_and_not_by_how_rows_are_cut() -> None:
    keys = draw_sample_keys(1, 7, slice(0, 8), CPU)
    assert torch.equal(keys[3:6], draw_sample_keys(1, 7, slice(3, 6), CPU))
    every = torch.cat([draw_sample_keys(seed, step, slice(0, 8), CPU) for seed in (1, 2) for step in range(100)])
    assert len(every.unique()) == len(every)


def test_tiles_and_a_compiled_function_draw_the_same() -> None:
    keys = draw_sample_keys(1, 7, slice(0, 70), CPU)
    expected = draw(keys[:, None], torch.arange(3000)) < round(0.3 * 2**64) - 2**63
    assert torch.equal(draw_dropped(keys, 3000, 0.3), expected)
    for count in (24, 40):  # a compiler's vectors, and what is left over

        def of_tokens(keys: Tensor, rows: Tensor, count: int = count) -> Tensor:
            return draw_dropped(draw(draw(keys, 2)[:, None], rows, 5).flatten(), count, 0.3)

        torch._dynamo.reset()
        compiled = torch.compile(of_tokens, fullgraph=True)
        assert torch.equal(compiled(keys, torch.arange(16)), of_tokens(keys, torch.arange(16)))


def test_what_is_kept_grows_and_its_gradient_too() -> None:
    x = torch.ones(4, 100, requires_grad=True)
    y = drop(x, draw_sample_keys(1, 7, slice(0, 4), CPU), 0.2)
    assert set(y.detach().unique().tolist()) == {0.0, 1.25}
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("rates", [DropoutConfig(0.5, 0.0), DropoutConfig(0.0, 0.5)])
def test_each_rate_drops_and_nothing_is_dropped_without_keys(rates: DropoutConfig) -> None:
    plain, model = Decoder(SMALL, seed=1), Decoder(SMALL, seed=1, dropout=rates)
    tokens = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(1))
    arguments = (tokens[:, :-1], tokens[:, 1:], torch.full((3, 16), 1 / 48))
    assert torch.equal(plain(*arguments)[0], model(*arguments)[0])
    losses = [model(*arguments, sample_keys=model.draw_sample_keys(step, slice(0, 3), CPU))[0] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert plain.draw_sample_keys(0, slice(0, 3), CPU) is None


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_have_a_range(rate: float) -> None:
    with pytest.raises(ValueError, match=r"^--hidden-dropout .*: must be at least 0 and below 1$"):
        DropoutConfig(hidden_dropout=rate).validate()
    with pytest.raises(ValueError, match=r"^--attention-dropout .*: must be at least 0 and below 1$"):
        DropoutConfig(attention_dropout=rate).validate()
