"""Gives benchmark_index.py a peer: weighted choice without replacement, compiled by numba.

It makes exponential keys in fp32, finds the one at the rank by two histograms of bits, and shuffles the choice. It is
given the weights, which the C++ core computes from the scores.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

_PARTS = 8
_HALF = 1 << 16


@nb.njit(inline="always")
def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@nb.njit(inline="always")
def _bounds(part, n):
    size = (n + _PARTS - 1) // _PARTS
    return part * size, min(n, (part + 1) * size)


@nb.njit(parallel=True, fastmath=True)
def _keys(weights, seed, keys):
    for part in nb.prange(_PARTS):
        first, last = _bounds(part, len(weights))
        for i in range(first, last):
            word = _mix(np.uint64(i) * np.uint64(0x9E3779B97F4A7C15) + seed)
            uniform = np.float32((word >> np.uint64(40)) + np.uint64(1)) * np.float32(2**-24)
            keys[i] = -np.log(uniform) / weights[i]


@nb.njit(parallel=True)
def _count_high(bits, counts):
    for part in nb.prange(_PARTS):
        first, last = _bounds(part, len(bits))
        for i in range(first, last):
            counts[part, bits[i] >> np.uint32(16)] += 1


@nb.njit(parallel=True)
def _count_low(bits, high, counts):
    for part in nb.prange(_PARTS):
        first, last = _bounds(part, len(bits))
        for i in range(first, last):
            if bits[i] >> np.uint32(16) == high:
                counts[part, bits[i] & np.uint32(_HALF - 1)] += 1


@nb.njit(parallel=True)
def _count_below(bits, cut, counts):
    for part in nb.prange(_PARTS):
        first, last = _bounds(part, len(bits))
        count = 0
        for i in range(first, last):
            count += bits[i] < cut
        counts[part] = count


@nb.njit(parallel=True)
def _collect(bits, cut, starts, out):
    for part in nb.prange(_PARTS):
        first, last = _bounds(part, len(bits))
        at = starts[part]
        for i in range(first, last):
            if bits[i] < cut:
                out[at] = i
                at += 1


@nb.njit
def _shuffle(ids, seed):
    state = seed
    for left in range(len(ids) - 1, 0, -1):
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
        other = state % np.uint64(left + 1)
        ids[left], ids[other] = ids[other], ids[left]


def choice(weights: np.ndarray[Any, np.dtype[np.float32]], samples: int) -> np.ndarray[Any, Any]:
    """Return `samples` different ids, shuffled."""
    keys = np.empty(len(weights), np.float32)
    _keys(weights, np.uint64(1), keys)
    bits = keys.view(np.uint32)  # of positive numbers: the same order
    counts = np.zeros((_PARTS, _HALF), np.int64)
    _count_high(bits, counts)
    sums = counts.sum(0).cumsum()
    high = int(np.searchsorted(sums, samples))
    before = sums[high - 1] if high else 0
    counts[:] = 0
    _count_low(bits, np.uint32(high), counts)
    low = int(np.searchsorted(counts.sum(0).cumsum() + before, samples))
    cut = np.uint32(high << 16 | low)
    below = np.zeros(_PARTS, np.int64)
    _count_below(bits, cut, below)
    chosen = np.empty(samples, np.uint32)
    _collect(bits, cut, np.concatenate(([0], below.cumsum()[:-1])), chosen)
    missing = samples - int(below.sum())
    if missing:
        chosen[samples - missing :] = np.flatnonzero(bits == cut)[:missing]
    _shuffle(chosen, np.uint64(2))
    return chosen
