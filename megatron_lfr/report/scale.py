"""Maps numbers to pixels of a plot: linear scales, round ticks, short numerals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """A linear map of values `low`..`high` to pixels `start`..`end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def array(self, values: Doubles) -> Doubles:
        """Map an array of values."""
        return self.start + (values - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values inside the scale."""
        step = nice_step((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def nice_step(rough: float) -> float:
    """Return the smallest number at or above `rough` that is 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))


def spanning(values: Sequence[float] | Doubles, start: float, end: float, from_zero: bool = False) -> Scale:
    """Return a scale over all finite values, with a little room at both ends; over 0 to 1 where there are none."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    low, high = (float(array.min()), float(array.max())) if len(array) else (0.0, 1.0)
    if from_zero:
        low = 0.0
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return Scale(low if from_zero else low - room, high + room, start, end)


def si(value: float) -> str:
    """Write a count with at most three digits and a prefix: 932480 is 932 k."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Write the numerals of ticks, with one precision for all."""
    if not ticks:
        return []
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=abs(ticks[0]) or 1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{0.0 if abs(tick) < step / 2 else tick:.{digits}f}" for tick in ticks]


def si_ticks(ticks: Sequence[float]) -> tuple[list[str], str]:
    """Write the numerals of large ticks in one unit; returns them with its prefix ("", "k", "M", ...)."""
    size, prefix = si_unit(ticks)
    return tick_labels([tick / size for tick in ticks]), prefix


def si_unit(ticks: Sequence[float]) -> tuple[float, str]:
    """Return the unit that large ticks are counted in, and its prefix ("", "k", "M", ...)."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    return next(((size, prefix) for size, prefix in _PREFIXES if largest >= size), (1.0, ""))


def percent(share: float, digits: int = 0) -> str:
    """Write a share as a percentage: 0.513 is 51 %; NaN and infinities are a dash."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "–"


def decimate(xs: Doubles, ys: Doubles, buckets: int) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """Join neighbouring points until at most `buckets` are left; returns (x, mean, min, max) of each. Where there are
    not more points than that, they stay as they are.

    Points whose y is not finite are left out.
    """
    finite = np.isfinite(ys)
    xs, ys = xs[finite], ys[finite]
    if len(xs) <= buckets:
        return xs, ys, ys, ys
    starts = np.arange(buckets) * len(xs) // buckets
    sizes = np.diff(np.append(starts, len(xs)))
    mean = np.add.reduceat(ys, starts) / sizes
    middle = np.add.reduceat(xs, starts) / sizes
    return middle, mean, np.minimum.reduceat(ys, starts), np.maximum.reduceat(ys, starts)
