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
