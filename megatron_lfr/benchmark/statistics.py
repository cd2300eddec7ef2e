"""Medians and how far they are to be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 2000


def summarize(seconds: Sequence[float]) -> dict[str, object]:
    """Return the median, its 95 % interval by bootstrap, the quartiles, and all values."""
    low, high = np.quantile(_medians(seconds), (0.025, 0.975)).tolist()
    first, third = np.quantile(seconds, (0.25, 0.75)).tolist()
    median = float(np.median(seconds))
    return {"median": median, "low": low, "high": high, "q25": first, "q75": third, "all": list(seconds)}


def ratio(new: Sequence[float], old: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of two medians, and its 95 % interval by bootstrap of both."""
    ratios = _medians(new) / _medians(old, seed=1)
    low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
    return float(np.median(new) / np.median(old)), low, high


def _medians(values: Sequence[float], seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    rng, array = np.random.default_rng(seed), np.asarray(values, np.float64)
    medians: np.ndarray[tuple[int], np.dtype[np.float64]] = np.median(rng.choice(array, (_RESAMPLES, len(array))), 1)
    return medians
