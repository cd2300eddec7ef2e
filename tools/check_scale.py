"""Checks orders over more blocks than 32 bits can count. Takes minutes, 14 GB, and two cores.

    python tools/check_scale.py

A permutation of 2^31 + 5 blocks holds each of them once, and mixes them evenly. From 2^32 + 10^7 blocks (of equal
scores, in memory that is never written, so that it takes none), weighted orders of a million samples, thresholds and
clusters: ids have 64 bits, reach beyond 2^32, differ where they must, and are spread evenly over the corpus and over
the order (chi-square, 63 degrees of freedom).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C

CELLS = 64
LIMIT = 131.0
"""Chi-square with 63 degrees of freedom exceeds this once in a million times."""


def timed(name: str, make: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = make()
    print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    return result


def check_even(ids: npt.NDArray[Any], n: int) -> None:
    """Check that the ids, and those in the first and the last tenth of the order, are spread over [0, n)."""
    for part in (ids, ids[: len(ids) // 10], ids[-len(ids) // 10 :]):
        counts = np.bincount((part.astype(np.uint64) // np.uint64(-(-n // CELLS))).astype(np.int64), minlength=CELLS)
        shares = np.diff(np.minimum(np.arange(CELLS + 1) * -(-n // CELLS), n)) / n
        expected = len(part) * shares
        assert ((counts - expected) ** 2 / expected).sum() < LIMIT, counts


def check_permutation(n: int) -> None:
    order = timed(f"permutation of {n:,} blocks", lambda: _C.permutation(n, 7))
    seen = np.zeros(n, np.bool_)
    for first in range(0, n, 1 << 26):
        seen[order[first : first + (1 << 26)]] = True
    assert len(order) == n
    assert seen.all()
    for first in (0, n // 2, n - 10_000_000):
        check_even(order[first : first + 10_000_000], n)


def check_samples(n: int, samples: int) -> None:
    scores = np.zeros(n, np.float32)
    weights = _C.BlockWeights(scores, [], 6.0)
    choice = timed(f"choice of {samples:,} out of {n:,}", lambda: _C.order_choice(weights, [1.0], 0.0, samples, 7))
    assert choice.dtype == np.uint64
    assert choice.max() > 2**32
    assert len(np.unique(choice)) == samples
    check_even(choice, n)
    visits = timed(f"visits of {samples:,} out of {n:,}", lambda: _C.order_visits(weights, [1.0], 0.0, samples, 7))
    assert visits.max() > n - n // samples - 2
    gaps = np.diff(np.sort(visits))  # systematic: evenly spaced in the corpus
    assert gaps.min() >= n // samples
    assert gaps.max() <= n // samples + 1
    check_even(visits[: samples // 10], n)
    cut, ties, dropped, seen = timed("threshold", lambda: _C.threshold(scores, 0.999))
    assert (cut, ties, dropped, seen) == (0.0, n * 999 // 1000, n * 999 // 1000, n)
    kept = n - dropped
    focus = timed(f"focus on {kept:,}", lambda: _C.order_threshold(scores, 0.999, True, kept, 7))
    assert np.array_equal(np.sort(focus), np.arange(dropped, n, dtype=np.uint64))  # of equal ones, the last stay
    assert len(timed("clusters", lambda: _C.cluster(scores, 8))) == 0  # of equal scores there is one
    assert (weights.counts.tolist(), weights.unseen) == ([n], 0)


def main() -> None:
    check_permutation(2**31 + 5)
    check_samples(2**32 + 10_000_000, 1_000_000)
    print("all as it should be")


if __name__ == "__main__":
    main()
