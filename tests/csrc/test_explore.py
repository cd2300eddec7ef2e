"""Samples drawn at random, and passes that are cut short."""

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


@pytest.mark.parametrize("n", [130, 1000, 10**6])
def test_draws_are_those_of_one_stream(n: int) -> None:
    """One after another, whatever is fetched ahead: numbers that came before are left out."""
    drawn = _C.draw_distinct(n, n // 2, 9)
    for count in (1, 63, 64, 65):
        assert _C.draw_distinct(n, count, 9).tolist() == drawn[:count].tolist()


@given(samples=st.integers(0, 300), share=st.floats(0, 1), threads=st.integers(1, 3))
def test_items_are_placed_evenly(samples: int, share: float, threads: int) -> None:
    count = int(share * samples)
    items, order = np.arange(count, dtype=np.uint32) + 1000, np.arange(samples, dtype=np.uint32)
    expected = order.copy()
    for i in range(count):
        expected[i * samples // count] = items[i]
    _C.place_evenly(items, order, threads)
    assert order.tolist() == expected.tolist()


def test_many_items_are_placed_evenly() -> None:
    count, samples = 700_000, 1_900_003
    items, order = np.arange(count, dtype=np.uint64), np.full(samples, 2**40, np.uint64)
    expected = order.copy()
    expected[np.arange(count) * samples // count] = items
    for threads in (1, 2):
        placed = order.copy()
        _C.place_evenly(items, placed, threads)
        assert np.array_equal(placed, expected)


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
