"""Dropout whose masks are a function of an element's position, not of the state of a random generator.

Whether an element is dropped follows from the run's seed, the step, the sample's row in the global batch, the layer,
the site in the layer, the token's position in its block and the channel; of attention, from the head and the positions
of query and key. So the masks are the same in every layout, for every size of micro-batches, where activations are
recomputed, and after a resume.

The numbers are SplitMix64's (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195), whose n-th one is a
hash of the generator's seed and n, so that any of them is drawn alone. A number of one level seeds the next level.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_INCREMENT = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_TILE, _TILE_ON_CPU = 1 << 24, 1 << 16
"""Elements drawn at a time, which take 16 bytes each: few on a CPU, to stay in its cache."""


class Site(IntEnum):
    """Where a layer drops."""

    ATTENTION = 0
    ATTENTION_OUTPUT = 1
    FEED_FORWARD = 2


@dataclass(frozen=True)
class DropoutConfig:
    """How much is dropped in training. An evaluation drops nothing, and neither does a rescoring."""

    attention_dropout: float = 0.0
    """Share of attention's weights that training drops, after the softmax. It makes attention compute all scores of a
    sequence, where otherwise a fused kernel keeps none. Megatron's default is 0.1."""
    hidden_dropout: float = 0.0
    """Share of the elements that training drops of the embeddings, and of what attention and feed-forward add to the
    residual stream. Megatron's default is 0.1."""

    @property
    def drops(self) -> bool:
        """Whether training drops anything."""
        return self.attention_dropout > 0 or self.hidden_dropout > 0

    def validate(self) -> None:
        """Check the ranges; ValueError names the flag and the legal values."""
        for flag, rate in (
            ("--attention-dropout", self.attention_dropout),
            ("--hidden-dropout", self.hidden_dropout),
        ):
            if not 0 <= rate < 1:
                raise ValueError(f"{flag} {rate}: must be at least 0 and below 1")


def draw_sample_keys(seed: int, step: int, rows: slice, device: torch.device) -> Tensor:
    """Return the key of each sample of a step: int64 [rows]. `rows` are consecutive ones of the global batch."""
    digest = hashlib.sha256(f"{seed}/dropout".encode()).digest()
    run = torch.full((), int.from_bytes(digest[:8], "little", signed=True), dtype=torch.int64, device=device)
    return draw(draw(run, step), torch.arange(rows.start, rows.stop, device=device))


def draw(keys: Tensor, index: Tensor | int, first: int = 0) -> Tensor:
    """Return number `first` + `index` of the generators whose seeds are `keys`, both int64 and broadcast: the bits of
    64-bit words without a sign."""
    # Products and sums wrap around, which leaves the bits right, whatever their sign is taken for.
    x = keys + _signed((first + 1 + (index if isinstance(index, int) else 0)) * _INCREMENT)
    if isinstance(index, Tensor):
        if torch.compiler.is_compiling():
            index = index + (keys & 0)  # else it computes with a range's numbers as exact integers, or wrongly (2.13)
        x = x + index * _signed(_INCREMENT)
    for bits, factor in _MIXING:
        x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1)).mul_(_signed(factor))
    return x


def draw_dropped(keys: Tensor, count: int, rate: float) -> Tensor:
    """Draw which of `count` elements are dropped, for each of `keys`: bool [*keys.shape, count]. Memory beyond that is
    bounded, without torch.compile, which makes no tensor of the numbers."""
    index, least_kept = torch.arange(count, device=keys.device), _signed(round(rate * 2**64) - 2**63)
    if torch.compiler.is_compiling():
        return draw(keys[..., None], index) < least_kept
    flat = keys.flatten()
    dropped = torch.empty(len(flat), count, dtype=torch.bool, device=keys.device)
    tile = max(1, (_TILE_ON_CPU if keys.device.type == "cpu" else _TILE) // count)
    for out, some in zip(torch.split(dropped, tile), torch.split(flat, tile), strict=True):
        torch.lt(draw(some[:, None], index), least_kept, out=out)
    return dropped.view(*keys.shape, count)


def drop(x: Tensor, keys: Tensor, rate: float) -> Tensor:
    """Drop elements of x [N, channels] by the keys of its tokens [N], and divide the others by 1 − rate."""
    return x.masked_fill(draw_dropped(keys, x.shape[-1], rate), 0.0) * (1 / (1 - rate))


def _signed(word: int) -> int:
    """Return the int64 with the same lowest 64 bits."""
    return (word + 2**63) % 2**64 - 2**63
