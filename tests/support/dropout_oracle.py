"""Which elements dropout drops, from the definition: SplitMix64 in NumPy's 64-bit words without a sign."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_lfr.model.dropout import DropoutConfig


def splitmix(seed: Any, number: Any) -> Any:
    """Return output `number` (from 0) of the generators with these seeds, which may be arrays."""
    with np.errstate(over="ignore"):
        z = np.asarray(seed, np.uint64) + (np.asarray(number, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Masks:
    """Factors of the elements of a step, of all its rows: 0 where they are dropped, else 1 / (1 - rate)."""

    def __init__(self, rates: DropoutConfig, seed: int, step: int, rows: int, length: int) -> None:
        self.rates, self.length = rates, length
        digest = hashlib.sha256(f"{seed}/dropout".encode()).digest()
        run = np.frombuffer(digest[:8], "<u8")[0]
        self.samples = splitmix(splitmix(run, step), np.arange(rows))

    def of_embedding(self, channels: int) -> Tensor:
        """Return factors [rows, tokens, channels]."""
        return self._of_tokens(splitmix(self.samples, 0), channels)

    def of_output(self, layer: int, site: int, channels: int) -> Tensor:
        """Return factors [rows, tokens, channels] of what attention (site 1) or feed-forward (2) adds."""
        return self._of_tokens(splitmix(splitmix(self.samples, layer + 1), site), channels)

    def of_attention(self, layer: int, heads: int) -> Tensor:
        """Return factors [rows, heads, queries, keys] of a layer's attention."""
        keys = splitmix(splitmix(splitmix(self.samples, layer + 1), 0)[:, None], np.arange(heads))
        queries = splitmix(keys[..., None], np.arange(self.length))
        return _factors(splitmix(queries[..., None], np.arange(self.length)), self.rates.attention_dropout)

    def _of_tokens(self, keys: Any, channels: int) -> Tensor:
        tokens = splitmix(keys[:, None], np.arange(self.length))
        return _factors(splitmix(tokens[..., None], np.arange(channels)), self.rates.hidden_dropout)


def _factors(numbers: Any, rate: float) -> Tensor:
    # As in torch, whose words have a sign: the upper half of the words comes first.
    uniform = (numbers.astype(np.int64).astype(np.float64) + 2.0**63) / 2.0**64
    return torch.from_numpy((uniform >= rate) / (1 - rate))
