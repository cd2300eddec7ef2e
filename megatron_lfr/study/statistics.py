"""What differences over few seeds and many documents say. SciPy gives quantiles and ranks; all else is here.

Intervals are of 95 %, two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
RESAMPLES_AT_A_TIME = 100
"""Each has a number for each document in memory."""
FURTHEST = 10.0
"""How many times beyond its runs' compute the line of uniform sampling is prolonged, at most."""


@dataclass(frozen=True)
class Interval:
    """A mean and its interval. low, high and p are None where there are too few values to say (n < 2)."""

    mean: float
    low: float | None
    high: float | None
    n: int
    p: float | None = None


def require_scipy() -> ModuleType:
    """Return scipy.stats; ValueError where SciPy is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise ValueError("megatron-lfr study: needs scipy (pip install 'megatron-lfr[study]')") from None
    module: ModuleType = stats
    return module


def paired_t(differences: Sequence[float]) -> Interval:
    """Return the mean of paired differences with Student's t interval, and the p-value of no difference.

    The interval is mean ± t(0.975, n - 1) · s / sqrt(n), with s the sample standard deviation. Where all differences
    are equal, the interval has no width, and p is 0, or 1 where they are 0.
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    if not n:
        return Interval(math.nan, None, None, 0)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, None, n)
    stats = require_scipy()
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down rule (Scand. J. Stat. 6, 1979): of m, the i-th
    smallest times m - i + 1, at least as large as the one before it, at most 1."""
    m, highest = len(p_values), 0.0
    adjusted = [1.0] * m
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def document_bootstrap(
    differences: Doubles, documents: npt.NDArray[np.int64], domains: npt.NDArray[np.int64], seed: int = 0
) -> Interval:
    """Return the macro mean (the mean of the domains' means) of differences of blocks [n], with the percentile interval
    over RESAMPLES resamples of documents within each domain.

    documents [n]: the document of each block, a cluster, whose number counts within its domain or over all. domains
    [n]: the domain of each block. NaN differences, of blocks that are masked, are left out.
    """
    known = np.isfinite(differences)
    differences, documents, domains = differences[known], documents[known], domains[known]
    generator = np.random.default_rng(seed)
    means, resampled, clusters = [], [], 0
    for domain in np.unique(domains):
        members = domains == domain
        _, cluster = np.unique(documents[members], return_inverse=True)
        sums, counts = np.bincount(cluster, differences[members]), np.bincount(cluster).astype(np.float64)
        clusters += len(sums)
        means.append(float(sums.sum() / counts.sum()))
        draws = []
        for first in range(0, RESAMPLES, RESAMPLES_AT_A_TIME):
            size = min(RESAMPLES_AT_A_TIME, RESAMPLES - first)
            times = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size)
            draws.append((times @ sums) / (times @ counts))
        resampled.append(np.concatenate(draws))
    if not means:
        return Interval(math.nan, None, None, 0)
    macro = np.mean(resampled, axis=0)
    low, high = np.quantile(macro, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    enough = clusters > len(means)  # with one document in each domain, nothing varies
    return Interval(float(np.mean(means)), low if enough else None, high if enough else None, clusters)


@dataclass(frozen=True)
class Equivalent:
    """compute: what uniform sampling needs for a loss. beyond: whether that lies outside of what was run, so that the
    line of the nearest two points was prolonged."""

    compute: float
    beyond: bool


def equivalent_compute(compute: Sequence[float], losses: Sequence[float], loss: float) -> Equivalent | None:
    """Return the compute at which uniform sampling has the given loss, by straight lines between (log compute, loss) of
    its runs, prolonged beyond the first and last two. None where there are fewer than two runs, their loss does not
    fall with compute everywhere, or the line would be prolonged by more than FURTHEST times."""
    order = np.argsort(compute)
    x, y = np.log(np.asarray(compute, np.float64)[order]), np.asarray(losses, np.float64)[order]
    if len(x) < 2 or not (np.diff(y) < 0).all() or not (np.diff(x) > 0).all():
        return None
    right = int(np.clip(np.searchsorted(-y, -loss), 1, len(y) - 1))
    slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
    at = float(x[right] + (loss - y[right]) / slope)
    if not x[0] - math.log(FURTHEST) <= at <= x[-1] + math.log(FURTHEST):
        return None
    return Equivalent(math.exp(at), not y[-1] <= loss <= y[0])


def log_interval(ratios: Sequence[float]) -> Interval:
    """Return the geometric mean of ratios, with Student's t interval of their logarithms."""
    logs = paired_t([math.log(ratio) for ratio in ratios])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Interval(math.exp(logs.mean) if logs.n else math.nan, low, high, logs.n)


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Kendall's tau-b of two orders; NaN where one of them has only ties or fewer than two entries."""
    if len(a) < 2:
        return math.nan
    return float(require_scipy().kendalltau(a, b).statistic)
