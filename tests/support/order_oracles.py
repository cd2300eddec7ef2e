"""What the C++ orders must produce, computed from the definitions, without regard to speed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


def kept_by_threshold(
    scores: npt.NDArray[np.float32], drop: float, keep_unseen: bool, drop_hardest: float = 0.0
) -> list[int]:
    """Return the ascending ids that are kept when the floor(drop * scored) lowest scores are dropped and then, while
    one is left, the floor(drop_hardest * scored) highest; ties by id."""
    scored = [i for i in range(len(scores)) if not math.isnan(scores[i])]
    ranked = sorted(scored, key=lambda i: (scores[i], i))
    lowest = min(math.floor(Fraction(str(drop)) * len(scored)), max(0, len(scored) - 1))
    highest = math.floor(Fraction(str(drop_hardest)) * len(scored))
    kept = ranked[lowest : max(lowest + 1, len(scored) - highest)]
    unseen = [i for i in range(len(scores)) if math.isnan(scores[i])]
    return sorted(kept + (unseen if keep_unseen else []))


def clusters_of(scores: npt.NDArray[np.float32], cuts: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return the number of cuts <= score; len(cuts) + 1 for NaN."""
    clusters = np.searchsorted(np.asarray(cuts, np.float64), scores.astype(np.float64), side="right")
    return np.where(np.isnan(scores), len(cuts) + 1, clusters)


def probabilities(
    scores: npt.NDArray[np.float32],
    cuts: Sequence[float],
    mass: Sequence[float],
    unseen_mass: float,
    cap: float,
    rule: str = "perplexity",
    bounds: tuple[float, float] = (0.0, 0.0),
    factors: npt.NDArray[np.float32] | None = None,
) -> Doubles:
    """Return the probability of each block in one weighted draw. bounds: of the rule "capped"."""
    clusters = clusters_of(scores, cuts)
    known = np.where(np.isnan(scores), 0.0, scores.astype(np.float64))
    weights = np.ones(len(scores))
    if rule == "perplexity":
        weights = np.exp(np.minimum(known, cap))
    elif rule == "capped" and bounds[0] < bounds[1]:
        weights = 1 + 2 * np.clip((known - bounds[0]) / (bounds[1] - bounds[0]), 0, 1)
    weights[np.isnan(scores)] = 1.0
    if factors is not None:
        weights *= factors
    masses = np.array([*mass, unseen_mass], np.float64)
    masses[[not (weights[clusters == c] > 0).any() for c in range(len(masses))]] = 0.0
    result = np.zeros(len(scores))
    for c, share in enumerate(masses / masses.sum()):
        members = clusters == c
        if share > 0:
            result[members] = share * weights[members] / weights[members].sum()
    return result


def inclusion_probabilities(probability: Sequence[float], samples: int) -> Doubles:
    """Return P(block is among `samples` successive draws without replacement), by enumeration of all sequences."""
    result = np.zeros(len(probability))
    for sequence in itertools.permutations(range(len(probability)), samples):
        left, chance = 1.0, 1.0
        for i in sequence:
            chance *= probability[i] / left
            left -= probability[i]
        result[list(sequence)] += chance
    return result


def chi_square(counts: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Pearson's statistic."""
    observed, mean = np.asarray(counts, np.float64), np.asarray(expected, np.float64)
    return float(((observed - mean) ** 2 / mean).sum())


def least_mse(values: Sequence[float], k: int) -> float:
    """Least mean squared distance to the means of k intervals of the sorted values, over all partitions."""
    ordered = np.sort(np.asarray(values, np.float64))
    best = math.inf
    for splits in itertools.combinations(range(1, len(ordered)), k - 1):
        parts = np.split(ordered, list(splits))
        best = min(best, sum(float(((part - part.mean()) ** 2).sum()) for part in parts))
    return best / len(ordered)


def least_mse_by_programme(values: Sequence[float], k: int) -> float:
    """Compute the same by the O(k n^2) dynamic programme, for inputs too large to enumerate."""
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)

    def cost(first: int, last: int) -> float:
        part = ordered[first:last]
        return float(((part - part.mean()) ** 2).sum())

    costs = {(a, b): cost(a, b) for a in range(n) for b in range(a + 1, n + 1)}
    best = [costs[0, j] if j else 0.0 for j in range(n + 1)]
    for _ in range(1, k):
        best = [min([best[j], *(best[s] + costs[s, j] for s in range(1, j))]) for j in range(n + 1)]
    return best[n] / n
