"""The loop over micro-batches, with a plain model and any strategy to synchronise it."""

from __future__ import annotations

import pytest
import torch

from megatron_lfr.engine.forward_backward import MicroBatchLoop
from megatron_lfr.model import Decoder, ModelConfig

ROWS, LENGTH = 6, 8


class Noted:
    """A strategy that records its calls."""

    def __init__(self) -> None:
        self.is_last: list[bool] = []

    def before_micro_batch(self, is_last: bool) -> None:
        self.is_last.append(is_last)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_plain_model_in_micro_batches_has_the_gradients_of_the_batch(size: int) -> None:
    config = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=20, max_position_embeddings=LENGTH
    )
    model, reference, strategy = Decoder(config, 1), Decoder(config, 1), Noted()
    tokens = torch.randint(0, 20, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    inputs = {
        "x": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "token_weight": torch.full((ROWS, LENGTH), 1 / (ROWS * LENGTH)),
    }
    losses = MicroBatchLoop(model, size, strategy).train(inputs)
    assert strategy.is_last == [False] * (ROWS // size - 1) + [True]
    loss, nll_sum, _ = reference(**inputs)
    loss.backward()
    torch.testing.assert_close(torch.cat([part.nll_sum for part in losses]), nll_sum)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)
    strategy.is_last.clear()
    MicroBatchLoop(model, size, strategy).evaluate(inputs)
    assert not strategy.is_last  # there is nothing to synchronise
