"""Random numbers that are a function of their position: any part of a matrix can be drawn alone, on its device.

The bits are those of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), normal deviates
come from Box and Muller's transform. All of it is integer arithmetic and additions, products, quotients and square
roots in fp32, each rounded as IEEE 754 says: the bits depend neither on how a matrix is cut into parts, nor on the
number of threads, nor on which of its loops, vectorised or not, a device's library takes an element through. `log`,
`cos` and `sqrt` of PyTorch, which are not rounded correctly, would break that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_PIECE, _PIECE_ON_CPU = 1 << 22, 1 << 17
"""Elements drawn at a time, which take some 40 bytes each: few on a CPU, to stay in its cache."""

_LN2 = math.log(2)
_SQRT_HALF_BITS = 0x3F3504F3
_ATANH = [2 / n for n in (1, 3, 5, 7, 9)]
"""ln m = 2 artanh f = f · (2 + 2/3 f² + 2/5 f⁴ + ...), f = (m - 1) / (m + 1)."""
_SINE = [(-1) ** n / math.factorial(2 * n + 1) for n in range(5)]
"""sin x = x · (1 - x²/3! + x⁴/5! - ...): to 2e-9 for |x| ≤ π/4."""


Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Turns two independent words in [0, 2³²), int64, into two independent numbers, fp32."""


@torch.no_grad()
def fill_normal(out: Tensor, std: float, *, seed: int, name: str, first_row: int = 0, first_column: int = 0) -> None:
    """Fill `out` fp32 [rows, columns] with normal deviates of mean 0 and standard deviation `std`.

    Each is a function of `seed`, `name` and its row and column, counted from first_row and first_column. Memory beyond
    `out` is bounded.
    """
    _fill(out, std, box_muller, seed, name, (first_row, first_column))


@torch.no_grad()
def fill_uniform(out: Tensor, bound: float, *, seed: int, name: str, first_row: int = 0, first_column: int = 0) -> None:
    """Fill `out` fp32 [rows, columns] with numbers that are uniform in [-bound, bound); otherwise as `fill_normal`."""
    _fill(out, bound, _symmetric, seed, name, (first_row, first_column))


def _fill(out: Tensor, scale: float, draw: Draw, seed: int, name: str, first: tuple[int, int]) -> None:
    words = [int.from_bytes(part, "little") for part in _parts(hashlib.sha256(f"{seed}/{name}".encode()).digest())]
    rows, columns = out.shape
    elements = _PIECE_ON_CPU if out.device.type == "cpu" else _PIECE
    width = max(1, min(columns, elements))
    height = max(1, elements // width)
    for top in range(0, rows, height):
        for start in range(0, columns, width):
            tile = out[top : top + height, start : start + width]
            drawn = _draw(draw, tile.shape, first[0] + top, first[1] + start, words, out.device)
            tile.copy_(drawn.mul_(scale))


def _parts(digest: bytes) -> list[bytes]:
    return [digest[first : first + 4] for first in range(0, 16, 4)]


def _draw(
    draw: Draw, shape: Sequence[int], row: int, column: int, words: Sequence[int], device: torch.device
) -> Tensor:
    """Draw numbers fp32 of `shape`, from (row, column) on. Each counter gives those of four columns."""
    rows, columns = shape
    first, end = column // 4, -(-(column + columns) // 4)
    counter = (
        torch.arange(first, end, device=device),
        torch.arange(row, row + rows, device=device)[:, None],
        *(torch.tensor(word, device=device) for word in words[2:]),
    )
    bits = philox([word.expand(rows, end - first) for word in counter], (words[0], words[1]))
    pairs = draw(torch.stack(bits[::2], -1), torch.stack(bits[1::2], -1))  # [rows, counters, 2] each
    return torch.stack(pairs, -1).flatten(1).narrow(1, column - 4 * first, columns)


def _symmetric(first_word: Tensor, second_word: Tensor) -> tuple[Tensor, Tensor]:
    """Turn words into numbers that are uniform in [-1, 1): their upper 24 bits, which fp32 holds exactly."""
    first, second = ((word >> 8).float().mul_(2.0**-23).sub_(1.0) for word in (first_word, second_word))
    return first, second


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply Philox4x32-10 to many counters of four words under one key of two; words are in [0, 2³²), as int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product's 64 bits are right, whatever their sign is taken for. Only its low words are not cut to 32 bits at
        # once: they are just combined with words that are.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Turn two independent words in [0, 2³²), int64, into two independent standard normal deviates, fp32, below 6.8."""
    uniform = radius_word.float().add_(0.5).mul_(2.0**-32)  # in (0, 1]
    radius = _sqrt(_log(uniform).mul_(-2.0))
    quarter = (angle_word - 2**31).float().mul_(math.pi / 4 * 2.0**-31)  # of an angle in [-π, π]
    sine = _polynomial(_SINE, quarter * quarter).mul_(quarter)
    square = sine * sine
    # sin 2x = 2 sin x cos x, cos 2x = 1 - 2 sin² x, twice
    half_sine = _sqrt(1.0 - square).mul_(sine).mul_(2.0)
    half_cosine = 1.0 - square.mul_(2.0)
    sine = (half_sine * half_cosine).mul_(2.0)
    cosine = 1.0 - half_sine.square_().mul_(2.0)
    return cosine.mul_(radius), sine.mul_(radius)


def _log(x: Tensor) -> Tensor:
    """Compute the natural logarithm of normal fp32 numbers: x = m · 2^e with m in [√½, √2)."""
    bits = x.view(torch.int32) - _SQRT_HALF_BITS
    exponent = bits >> 23
    mantissa = bits.bitwise_and_(0x7FFFFF).add_(_SQRT_HALF_BITS).view(torch.float32)
    f = (mantissa - 1.0).div_(mantissa + 1.0)
    return _polynomial(_ATANH, f * f).mul_(f).add_(exponent.float().mul_(_LN2))


def _sqrt(x: Tensor) -> Tensor:
    """Compute the square root of fp32 numbers, 0 or above 2⁻⁶⁰, rounded correctly.

    On a CPU the `sqrt` of PyTorch is MKL's, which rounds wrongly on some processors, and keeps half of the bits where
    several threads call it first (pytorch/pytorch#188792). One step of Newton's method from the root of a double is
    exact in all but its last bits, and no root of fp32 numbers is so close to the middle of two of them.
    """
    square = x.double()
    root = square.sqrt()
    return square.div_(root.clamp(min=2.0**-60)).add_(root).mul_(0.5).float()


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Evaluate c₀ + c₁ x + c₂ x² + ... by Horner's rule."""
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0])
