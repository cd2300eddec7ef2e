"""Samples drawn at random, and mixed into an order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr import _C
from support.order_oracles import chi_square

seeds = st.integers(0, 2**64 - 1)


@given(n=st.integers(0, 200), share=st.floats(0, 1), seed=seeds)
def test_numbers_are_different(n: int, share: float, seed: int) -> None:
    count = int(share * n)
    drawn = _C.draw_distinct(n, count, seed).tolist()
    assert len(drawn) == len(set(drawn)) == count
    assert all(0 <= number < n for number in drawn)


@pytest.mark.parametrize("n", [3, 4])  # 2 of 3 are the beginning of a permutation, 2 of 4 are drawn
def test_every_sequence_is_equally_likely(n: int) -> None:
    rounds, possible = 6000, n * (n - 1)
    counts = Counter(tuple(_C.draw_distinct(n, 2, seed, 1).tolist()) for seed in range(rounds))
    assert len(counts) == possible
    assert chi_square(list(counts.values()), rounds / possible) < 36  # 99.99th percentile for 11 degrees is 37.4


@given(count=st.integers(0, 60), extra=st.integers(0, 60), seed=seeds)
def test_mixing_keeps_the_order_of_the_items(count: int, extra: int, seed: int) -> None:
    items, more = np.arange(count, dtype=np.uint32), np.arange(1000, 1000 + extra, dtype=np.uint32)
    mixed = _C.mix_in(items, more, seed)
    assert mixed[mixed < 1000].tolist() == items.tolist()
    assert sorted(mixed[mixed >= 1000].tolist()) == more.tolist()


def test_mixing_of_several_chunks_does_not_depend_on_threads() -> None:
    items, more = np.arange(900_000, dtype=np.uint64), np.arange(10**9, 10**9 + 90_000, dtype=np.uint64)
    mixed = [_C.mix_in(items, more, 3, threads) for threads in (1, 2, 5)]
    assert np.array_equal(mixed[0], mixed[1])
    assert np.array_equal(mixed[0], mixed[2])
    assert np.array_equal(mixed[0][mixed[0] < 10**9], items)
    positions = np.flatnonzero(mixed[0] >= 10**9)
    assert np.abs(np.histogram(positions, 10, (0, 990_000))[0] - 9000).max() < 5 * np.sqrt(9000)


def test_every_mixture_is_equally_likely() -> None:
    rounds = 6000
    items, more = np.array([0, 1], np.uint32), np.array([8, 9], np.uint32)
    counts = Counter(tuple(_C.mix_in(items, more, seed, 1).tolist()) for seed in range(rounds))
    assert len(counts) == 12
    assert chi_square(list(counts.values()), rounds / 12) < 36


@given(n=st.integers(1, 100), seed=seeds, data=st.data())
def test_the_beginning_of_a_pass_is_that_of_the_complete_one(n: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    assert _C.permutation(n, seed, samples=count).tolist() == _C.permutation(n, seed)[:count].tolist()


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.97])
def test_the_beginning_of_a_pass_of_several_buckets(share: float) -> None:
    n = 900_000
    count = int(share * n)
    visits = (np.arange(n) % 3).astype(np.uint32)
    assert np.array_equal(_C.permutation(n, 5, samples=count), _C.permutation(n, 5)[:count])
    assert np.array_equal(_C.shuffle_visits(visits, 5, samples=count), _C.shuffle_visits(visits, 5)[:count])
    scores = np.random.default_rng(1).normal(3, 1, n).astype(np.float32)
    complete = _C.order_threshold(scores, 0.1, True, n - n // 10, 5)
    assert np.array_equal(_C.order_threshold(scores, 0.1, True, min(count, n - n // 10), 5), complete[:count])


def test_illegal_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="count"):
        _C.draw_distinct(3, 4, 0)
    with pytest.raises(ValueError, match="extra"):
        _C.mix_in(np.zeros(2, np.uint32), np.zeros(2, np.uint64), 0)
