"""Uniform orders and threshold orders against their definitions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr import _C
from support.order_oracles import chi_square, kept_by_threshold

SEVERAL_BUCKETS = 300_000  # samples: more than one bucket of the shuffle, and more than one chunk of blocks
NESTED_BUCKETS = 6_000_000  # buckets that are divided in turn

levels = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.0, 3.25, float("nan")]), max_size=60)
tails = st.sampled_from(
    [
        (0.0, 0.0),
        (0.1, 0.0),
        (0.29, 0.3),
        (0.5, 0.0),
        (0.0, 0.5),
        (0.7, 0.29),
        (0.95, 0.0),
        (0.999999, 0.0),
        (0.3, 0.699),
    ]
)
"""Shares of the easiest and of the hardest blocks that are dropped."""
seeds = st.integers(0, 2**64 - 1)


def _rounded_scores(n: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(4)
    scores = np.round(rng.gamma(9, 0.35, n), 1).astype(np.float32)
    scores[rng.random(n) < 0.05] = np.nan
    return scores


# Around the edges of what is divided into buckets (beyond 2^14 samples) and of chunks (2^18 blocks); several of both.
@pytest.mark.parametrize("n", [2**14, 2**14 + 1, 65_537, 2**18 - 1, 2**18, 2**18 + 1, 700_000, NESTED_BUCKETS + 1])
def test_permutation_holds_every_id_once(n: int) -> None:
    ids = _C.permutation(n, 5)
    assert ids.dtype == np.uint32
    assert np.array_equal(np.sort(ids), np.arange(n))


@given(n=st.integers(0, 3000), seed=seeds)
def test_permutation_of_few_holds_every_id_once(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(_C.permutation(n, seed)), np.arange(n))


def test_more_ids_than_memory_are_refused() -> None:
    with pytest.raises((MemoryError, ValueError)):
        _C.permutation(2**62, 0)


@pytest.mark.parametrize("samples", [0, 1, 9, 10, 11, 25, 30])
def test_samples_are_passes_by_the_seeds_and_the_last_is_cut_short(samples: int) -> None:
    visits = np.array([0, 2, 1, 0, 1, 6], np.uint32)
    seeds = [5, 2**64 - 1, 7]
    for one_pass in (partial(_C.permutation, 10), partial(_C.shuffle_visits, visits)):
        passes = np.concatenate([one_pass(seed) for seed in seeds])
        assert np.array_equal(one_pass(seeds, samples=samples), passes[:samples])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.permutation(10, [1, 2], samples=21), "seed: 2 for 3 passes"),
        (lambda: _C.permutation(10, []), "seed: 0 for 1 passes"),
        (lambda: _C.permutation(0, 1, samples=1), "samples: there is no block"),
        (lambda: _C.shuffle_visits(np.zeros(3, np.uint32), 1, samples=1), "samples: there is no block"),
        (lambda: _C.permutation(10, 1, samples=-1), "samples: -1 is not in"),
        (lambda: _C.permutation(10, [1, -1], samples=20), "seed: -1 is not in"),
    ],
)
def test_passes_that_cannot_be(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_all_permutations_of_four_are_equally_likely() -> None:
    rounds = 24_000
    counts = Counter(tuple(_C.permutation(4, seed).tolist()) for seed in range(rounds))
    assert len(counts) == 24
    assert chi_square(list(counts.values()), rounds / 24) < 58  # 99.99th percentile for 23 degrees of freedom


def test_all_arrangements_of_a_multiset_are_equally_likely() -> None:
    rounds = 12_000
    visits = np.array([2, 0, 1, 1], np.uint32)
    counts = Counter(tuple(_C.shuffle_visits(visits, seed).tolist()) for seed in range(rounds))
    assert len(counts) == 12
    assert chi_square(list(counts.values()), rounds / 12) < 38  # 99.99th percentile for 11 degrees of freedom


@pytest.mark.parametrize(("n", "cells", "rounds"), [(SEVERAL_BUCKETS, 20, 20), (NESTED_BUCKETS, 500, 2)])
def test_ids_and_places_are_independent_across_buckets(n: int, cells: int, rounds: int) -> None:
    """Each statistic has (cells - 1)^2 degrees of freedom; too regular an order would be as wrong as a biased one."""
    cell = np.arange(n) * cells // n
    total = 0.0
    for seed in range(rounds):
        block = _C.permutation(n, seed).astype(np.int64) * cells // n
        table = np.bincount(cell * cells + block, minlength=cells * cells)
        total += chi_square(table, n / cells**2)
    freedom = rounds * (cells - 1) ** 2
    assert abs(total - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_are_independent() -> None:
    """The number of times that id i + 1 directly follows id i is about Poisson, with mean 1; over all seeds, 50."""
    follows = sum(int((np.diff(_C.permutation(100_000, seed).astype(np.int64)) == 1).sum()) for seed in range(50))
    assert 50 - 5 * 7.1 < follows < 50 + 5 * 7.1


@pytest.mark.parametrize("n", [SEVERAL_BUCKETS, NESTED_BUCKETS])
def test_no_distance_between_places_shows_in_the_ids(n: int) -> None:
    """Tests the autocorrelation at every distance: buckets shuffled alike would show at the size of a bucket."""
    ids = _C.permutation(n, 6).astype(np.float64)
    ids = (ids - ids.mean()) / ids.std()
    correlation = np.fft.irfft(np.abs(np.fft.rfft(ids)) ** 2, n)[1:] / n
    assert np.abs(correlation).max() < 6.5 / np.sqrt(n)  # the largest of n / 2 normal numbers


def test_seeds_give_unrelated_orders() -> None:
    """The position of a block in one order says nothing about its position in another."""
    cells = 20
    places = [np.argsort(_C.permutation(SEVERAL_BUCKETS, seed)) * cells // SEVERAL_BUCKETS for seed in (0, 1, 2**63)]
    for first, second in itertools.combinations(places, 2):
        statistic = chi_square(np.bincount(first * cells + second, minlength=cells**2), SEVERAL_BUCKETS / cells**2)
        freedom = (cells - 1) ** 2
        assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@given(visits=st.lists(st.integers(0, 5), max_size=80), seed=seeds)
def test_visits_are_kept(visits: list[int], seed: int) -> None:
    counts = np.array(visits, np.uint32)
    order = _C.shuffle_visits(counts, seed)
    assert np.array_equal(np.bincount(order, minlength=len(visits)), counts)


def test_places_of_a_block_are_uniform_across_buckets() -> None:
    """The visits of a block, of many at either end, are spread over the complete order."""
    counts = np.ones(SEVERAL_BUCKETS, np.uint32)
    heavy, cells = [0, 150_000, SEVERAL_BUCKETS - 1], 50
    counts[heavy] = 100_000
    order = _C.shuffle_visits(counts, 8)
    for block in heavy:
        table = np.bincount(np.flatnonzero(order == block) * cells // len(order), minlength=cells)
        # A cell holds 2000 visits on average, hypergeometric: its variance is 5/6 of a multinomial's.
        statistic = chi_square(table, 100_000 / cells) / (1 - 100_000 / len(order))
        assert abs(statistic - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1))


def test_visits_are_kept_across_buckets() -> None:
    counts = np.random.default_rng(1).poisson(1.3, SEVERAL_BUCKETS).astype(np.uint32)
    counts[17] = 100_000
    assert np.array_equal(np.bincount(_C.shuffle_visits(counts, 3), minlength=len(counts)), counts)


@given(values=levels, tails=tails)
def test_threshold_describes_what_is_kept(values: list[float], tails: tuple[float, float]) -> None:
    scores = np.array(values, np.float32)
    low, high, seen = _C.threshold(scores, tails[0], drop_hardest=tails[1])
    dropped = (scores < low[0]) | (scores > high[0])
    dropped[np.flatnonzero(scores == low[0])[: low[1]]] = True
    ties = np.flatnonzero(scores == high[0])
    dropped[ties[len(ties) - high[1] :]] = True
    kept = np.flatnonzero(~dropped & ~np.isnan(scores))
    assert kept.tolist() == kept_by_threshold(scores, tails[0], False, tails[1])
    assert seen == np.count_nonzero(~np.isnan(scores))
    assert low[2] + high[2] == seen - len(kept)


def _misleading(n: int) -> npt.NDArray[np.float32]:
    """Return scores of which every 64th group of 64 blocks is unlike the others."""
    return np.where(np.arange(n) // 64 % 64 == 0, 5.0, np.linspace(0, 1, n)).astype(np.float32)


@pytest.mark.parametrize(
    "scores",
    [
        _rounded_scores(700_000),
        np.random.default_rng(1).normal(3, 1, 700_000).astype(np.float32),
        np.linspace(-3, 9, 700_000, dtype=np.float32),
        _misleading(700_000),
        np.where(np.arange(700_000) % 1000 == 0, 1.0, np.nan).astype(np.float32),
        np.full(700_000, -2.5, np.float32),
    ],
    ids=["ties", "normal", "sorted", "misleading", "few", "equal"],
)
@pytest.mark.parametrize("share", [0.0, 0.00001, 0.3, 0.5, 0.9993, 1 - 2**-30])
def test_ranks_of_many_blocks(scores: npt.NDArray[np.float32], share: float) -> None:
    """The rank is exact, whether or not a sample of the scores leads near it."""
    ordered = np.sort(scores[~np.isnan(scores)])
    (cut, tie_quota, dropped), highest, seen = _C.threshold(scores, share)
    assert seen == len(ordered)
    assert dropped == min(math.floor(Fraction(str(share)) * seen), seen - 1)
    assert cut == ordered[dropped]
    assert tie_quota == dropped - np.searchsorted(ordered, cut)
    assert highest == (np.inf, 0, 0)
    lowest, (cut, tie_quota, dropped), _ = _C.threshold(scores, 0.0, drop_hardest=share)
    assert lowest == (ordered[0], 0, 0)
    assert dropped == min(math.floor(Fraction(str(share)) * seen), seen - 1)
    assert cut == (ordered[seen - 1 - dropped] if share else np.inf)
    assert tie_quota == dropped - (seen - np.searchsorted(ordered, np.float32(cut), side="right"))
    assert _C.percentiles(scores, [share]) == ordered[max(math.ceil(Fraction(str(share)) * seen), 1) - 1]


@given(values=levels, tails=tails, keep_unseen=st.booleans(), samples=st.integers(0, 200), seed=seeds)
def test_threshold_order_makes_whole_passes(
    values: list[float], tails: tuple[float, float], keep_unseen: bool, samples: int, seed: int
) -> None:
    scores = np.array(values, np.float32)
    drop, drop_hardest = tails
    kept = kept_by_threshold(scores, drop, keep_unseen, drop_hardest)
    if not kept and samples:
        with pytest.raises(ValueError, match="no block"):
            _C.order_threshold(scores, drop, keep_unseen, samples, seed, drop_hardest=drop_hardest)
        return
    order = _C.order_threshold(scores, drop, keep_unseen, samples, seed, drop_hardest=drop_hardest).tolist()
    assert len(order) == samples
    for first in range(0, samples, len(kept) or 1):
        part = order[first : first + len(kept)]
        assert len(set(part)) == len(part)
        assert set(part) <= set(kept)


@pytest.mark.parametrize("drop_hardest", [0.0, 0.25])
@pytest.mark.parametrize("keep_unseen", [True, False])
def test_threshold_order_of_many_blocks(drop_hardest: float, keep_unseen: bool) -> None:
    scores = _rounded_scores(600_000)  # three chunks, with ties across them
    kept = kept_by_threshold(scores, 0.4, keep_unseen, drop_hardest)
    order = _C.order_threshold(scores, 0.4, keep_unseen, 2 * len(kept) + 1000, 9, drop_hardest=drop_hardest)
    first, second, rest = np.split(order, [len(kept), 2 * len(kept)])
    assert np.array_equal(np.sort(first), kept)
    assert np.array_equal(np.sort(second), kept)
    assert len(set(rest.tolist())) == 1000
    assert not np.array_equal(first, second)
    assert set(rest.tolist()) <= set(kept)


def test_the_part_of_the_last_pass_is_a_uniform_choice() -> None:
    scores = np.arange(10, dtype=np.float32)
    counts = np.zeros(10)
    rounds = 5000
    for seed in range(rounds):
        counts[_C.order_threshold(scores, 0.5, False, 7, seed)[5:]] += 1
    assert counts[:5].sum() == 0
    # Each of five blocks is among the two with probability 0.4: 5 standard deviations.
    assert np.abs(counts[5:] - 0.4 * rounds).max() < 5 * np.sqrt(0.24 * rounds)


@pytest.mark.parametrize(("drop", "seen", "dropped"), [(0.29, 100, 29), (0.7, 10, 7), (0.57, 1_000_000, 570_000)])
def test_decimal_shares_are_meant_as_written(drop: float, seen: int, dropped: int) -> None:
    assert _C.threshold(np.zeros(seen, np.float32), drop)[0][2] == dropped
    assert _C.threshold(np.zeros(seen, np.float32), 0.0, drop_hardest=drop)[1][2] == dropped


def test_without_scores_nothing_is_dropped() -> None:
    scores = np.full(5, np.nan, np.float32)
    assert _C.threshold(scores, 0.9, drop_hardest=0.05) == ((-np.inf, 0, 0), (np.inf, 0, 0), 0)
    assert np.sort(_C.order_threshold(scores, 0.9, True, 5, 0)).tolist() == [0, 1, 2, 3, 4]
    assert _C.order_threshold(scores, 0.9, False, 0, 0).tolist() == []


def test_a_share_below_one_never_drops_every_block() -> None:
    zeros = np.zeros(3, np.float32)
    assert _C.threshold(zeros, 1 - 2**-53) == ((0.0, 2, 2), (np.inf, 0, 0), 3)
    assert _C.threshold(zeros, 0.5, drop_hardest=0.5 - 2**-53) == ((0.0, 1, 1), (0.0, 1, 1), 3)
    assert _C.threshold(zeros, 0.0, drop_hardest=1 - 2**-53) == ((0.0, 0, 0), (0.0, 2, 2), 3)


@pytest.mark.parametrize("id_type", [np.uint32, np.uint64])
@pytest.mark.parametrize("counts", [[0, 3, 0, 5, 0], [1], [], [200_000, 1, 0, 500_000], [1000] * 300])
def test_interleaving_keeps_each_sequence(id_type: type, counts: list[int]) -> None:
    n = sum(counts)
    ids = np.random.default_rng(1).permutation(n).astype(id_type)
    merged = _C.interleave(ids, counts, 4)
    assert merged.dtype == id_type
    owner = np.empty(n, np.int64)
    owner[ids] = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    for part, (count, end) in enumerate(zip(counts, ends, strict=True)):
        assert np.array_equal(merged[owner[merged] == part], ids[end - count : end])
    for threads in (1, 2, 7):
        assert np.array_equal(_C.interleave(ids, counts, 4, threads), merged)


def test_all_interleavings_are_equally_likely() -> None:
    rounds = 60_000
    ids = np.arange(6, dtype=np.uint32)
    counts = Counter(tuple(_C.interleave(ids, [2, 1, 3], seed).tolist()) for seed in range(rounds))
    legal = 60  # 6! / (2! 1! 3!)
    assert len(counts) == legal
    expected = rounds / legal
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 103.4  # 59 degrees, p = 0.0003


def test_interleaving_mixes_places_evenly() -> None:
    """A sequence has its share in every part of the order, over several buckets and chunks."""
    ids = np.zeros(SEVERAL_BUCKETS, np.uint32)
    ids[: SEVERAL_BUCKETS // 4] = 1
    merged = _C.interleave(ids, [SEVERAL_BUCKETS // 4, SEVERAL_BUCKETS - SEVERAL_BUCKETS // 4], 9)
    share = merged[: len(merged) // 64 * 64].reshape(64, -1).mean(axis=1)
    sigma = np.sqrt(0.25 * 0.75 / (len(merged) // 64))
    assert np.abs(share - 0.25).max() < 4.5 * sigma


@pytest.mark.parametrize("counts", [[3], [3, 3], [2**64 - 1, 6]])
def test_counts_that_do_not_add_up(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="counts: add up"):
        _C.interleave(np.arange(5, dtype=np.uint32), counts, 0)


@pytest.mark.parametrize("id_type", [np.uint32, np.uint64])
@pytest.mark.parametrize("sizes", [[5], [3, 0, 4, 0], [100_000, 1, 300_000], [3] * 50_000, [0, 0, 1]])
def test_counts_by_part(id_type: type, sizes: list[int]) -> None:
    ids = np.random.default_rng(2).integers(0, sum(sizes), 600_000).astype(id_type)
    expected = np.histogram(ids, np.concatenate(([0], np.cumsum(sizes))) - 0.5)[0]
    assert np.array_equal(_C.count_parts(ids, sizes), expected)
    with pytest.raises(ValueError, match="beyond the last part"):
        _C.count_parts(np.array([0, sum(sizes)], id_type), sizes)


def test_counts_of_nothing() -> None:
    assert _C.count_parts(np.empty(0, np.uint32), [3, 4]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="beyond"):
        _C.count_parts(np.zeros(1, np.uint32), [])
