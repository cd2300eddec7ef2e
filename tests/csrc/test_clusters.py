"""Exact k-means and quantiles against enumeration and sorting."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr import _C
from support.order_oracles import clusters_of, least_mse, least_mse_by_programme

BINS = 4096


def check_clusters(scores: npt.NDArray[np.float32], k: int, cap: float = 700.0) -> float:
    """Compare all but the choice of cuts with NumPy; return the mean squared distance to the means of clusters."""
    cuts = _C.cluster(scores, k, BINS)
    weights = _C.BlockWeights(scores, cuts, cap)
    counts, perplexity = weights.counts, weights.mean_weights()[:-1]
    assert cuts.dtype == perplexity.dtype == np.float64
    assert counts.dtype == np.int64
    assert len(counts) == len(perplexity) == len(cuts) + 1 <= k
    assert (np.diff(cuts) > 0).all()
    assert weights.unseen == np.isnan(scores).sum()
    seen = scores[~np.isnan(scores)].astype(np.float64)
    clusters = clusters_of(seen.astype(np.float32), cuts)
    assert counts.tolist() == np.bincount(clusters, minlength=len(counts)).tolist()
    assert counts.min() > 0
    for c in range(len(counts)):
        part = seen[clusters == c]
        assert perplexity[c] == pytest.approx(np.exp(np.minimum(part, cap)).mean(), rel=3e-7)
    return mean_squared_distance(seen.astype(np.float32), cuts)


def mean_squared_distance(scores: npt.NDArray[np.float32], cuts: npt.NDArray[np.float64]) -> float:
    """Return the mean squared distance of scores to the means of their clusters."""
    clusters = clusters_of(scores, cuts.tolist())
    parts = [scores[clusters == c].astype(np.float64) for c in range(len(cuts) + 1)]
    return sum(float(((part - part.mean()) ** 2).sum()) for part in parts) / len(scores)


def assert_near_optimum(mse: float, best: float, scores: npt.NDArray[np.float32]) -> None:
    """Binning moves no score by more than a bin, so it changes the root mean square by no more than twice that."""
    width = float(np.nanmax(scores) - np.nanmin(scores)) / BINS
    assert math.sqrt(best) - 1e-6 <= math.sqrt(mse) <= math.sqrt(best) + 2 * width + 1e-6


@given(values=st.lists(st.floats(-3, 12, width=32), min_size=2, max_size=11, unique=True), k=st.integers(1, 5))
def test_clusters_are_the_best_of_all_partitions(values: list[float], k: int) -> None:
    scores = np.array([*values, np.nan], np.float32)
    mse = check_clusters(scores, k)
    assert_near_optimum(mse, least_mse(values, min(k, len(values))), scores)


@given(values=st.lists(st.sampled_from([-1.0, 0.0, 0.25, 2.0, 9.0]), min_size=5, max_size=12), k=st.integers(1, 3))
def test_equal_scores_weigh_by_their_number(values: list[float], k: int) -> None:
    scores = np.array(values, np.float32)
    mse = check_clusters(scores, k)
    assert_near_optimum(mse, least_mse(values, min(k, len(values))), scores)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_clusters_are_the_best_of_many_scores(k: int) -> None:
    scores = np.random.default_rng(k).gamma(2, 1.5, 300).astype(np.float32)
    assert check_clusters(scores, k) <= 1.001 * least_mse_by_programme(scores.tolist(), k)


@pytest.mark.parametrize("k", [2, 8, 16])
def test_bins_cost_less_than_a_thousandth(k: int) -> None:
    """Bins a sixteenth as wide do not improve it by more: the exact optimum of a million blocks is out of reach."""
    scores = np.random.default_rng(k).gamma(9, 0.35, 1_000_000).astype(np.float32)
    assert mean_squared_distance(scores, _C.cluster(scores, k)) <= 1.001 * mean_squared_distance(
        scores, _C.cluster(scores, k, 65_536)
    )


def test_clusters_of_many_blocks_are_summed_exactly() -> None:
    rng = np.random.default_rng(1)
    scores = rng.gamma(9, 0.35, 600_000).astype(np.float32)
    scores[rng.random(len(scores)) < 0.1] = np.nan
    check_clusters(scores, 8, cap=5.0)


def test_fewer_distinct_scores_than_clusters() -> None:
    scores = np.array([1, 5, 1, 5, 5, np.nan], np.float32)
    assert check_clusters(scores, 8) == 0.0
    cuts = _C.cluster(scores, 8)
    assert len(cuts) == 1
    assert 1 < cuts[0] <= 5


def test_equal_scores_make_one_cluster() -> None:
    scores = np.full(7, 2.0, np.float32)
    assert check_clusters(scores, 8) == 0.0
    assert len(_C.cluster(scores, 8)) == 0


@pytest.mark.parametrize("low", [-3e38, -500.0, -2.5])
def test_means_of_a_cluster_far_below_its_upper_edge(low: float) -> None:
    """Its weights are then taken relative to its heaviest block, so that they do not vanish."""
    scores = np.array([low, low, 600.0, 601.0, np.nan], np.float32)
    weights = _C.BlockWeights(scores, [599.0], 700.0)
    assert weights.counts.tolist() == [2, 2]
    expected = [math.exp(max(low, -700.0)), (math.exp(600) + math.exp(601)) / 2]
    assert weights.mean_weights()[:-1] == pytest.approx(expected, rel=3e-7, abs=0)
    order = _C.order_visits(weights, [1.0, 0.0], 0.0, 10, 3)
    assert np.bincount(order).tolist() == [5, 5]


def test_an_empty_cluster_has_no_mean() -> None:
    weights = _C.BlockWeights(np.ones(3, np.float32), [-1.0, 5.0], 9.0)
    assert weights.counts.tolist() == [0, 3, 0]
    assert weights.mean_weights()[:-1].tolist() == [0.0, pytest.approx(math.e, rel=3e-7), 0.0]


@given(score=st.floats(-700, 700, width=32), cap=st.floats(-700, 700, width=32))
def test_perplexity_is_the_exponential(score: float, cap: float) -> None:
    perplexity = _C.BlockWeights(np.array([score], np.float32), [], cap).mean_weights()[0]
    assert perplexity == pytest.approx(math.exp(min(score, cap)), rel=5e-6, abs=0)


def test_small_clusters_far_from_a_large_one_are_told_apart() -> None:
    """Sums of squares of the large cluster must not drown those of the small ones."""
    scores = np.concatenate([np.repeat([-30.0, 29.0, 29.5, 30.0], 2), np.zeros(500_000)]).astype(np.float32)
    cuts = _C.cluster(scores, 5, 65_536)
    assert np.bincount(clusters_of(scores, cuts)).tolist() == [2, 500_000, 2, 2, 2]


@given(values=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 7.0, 1e30, float("nan")]), max_size=40))
@pytest.mark.parametrize("q", [0.0, 0.07, 0.5, 0.999, 1.0])
def test_percentile_is_an_order_statistic(q: float, values: list[float]) -> None:
    scores = np.array(values, np.float32)
    seen = np.sort(scores[~np.isnan(scores)])
    if len(seen) == 0:
        with pytest.raises(ValueError, match="no block"):
            _C.percentiles(scores, [q])
        return
    assert _C.percentiles(scores, [q]) == seen[max(math.ceil(Fraction(str(q)) * len(seen)), 1) - 1]


def test_percentile_of_scores_that_share_their_high_bits() -> None:
    scores = (1 + np.random.default_rng(0).permutation(600_000) * 1e-7).astype(np.float32)
    assert _C.percentiles(scores, [0.999]) == np.sort(scores)[599_400 - 1]


@pytest.mark.parametrize("n", [3, 1000, 900_000])
def test_several_percentiles_are_those_of_each(n: int) -> None:
    """Up to three are ranked in one pass; close ones, far ones and both ends, with many ties and without."""
    rng = np.random.default_rng(n)
    for scores in (rng.normal(size=n), rng.integers(0, 20, n)):
        shares = [0.5, 0.05, 0.95, 0.9501, 0.0, 1.0, 0.5, 0.051, *rng.random(3).tolist()]
        with_gaps = np.insert(scores.astype(np.float32), [0, n // 2], np.nan)
        ranks = [max(math.ceil(Fraction(str(q)) * n), 1) - 1 for q in shares]
        expected = np.sort(scores.astype(np.float32))[ranks]
        for first in range(len(shares)):
            for last in range(first + 1, len(shares) + 1):
                percentiles = _C.percentiles(with_gaps, shares[first:last], 2)
                np.testing.assert_array_equal(percentiles, expected[first:last])
            if n > 1000 and first > 2:
                break


@pytest.mark.parametrize(
    ("k", "bins", "message"),
    [(0, 4096, "k:"), (64, 4096, "k:"), (8, 7, "bins"), (8, 2**16 + 1, "bins")],
)
def test_illegal_arguments_of_cluster(k: int, bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.cluster(np.ones(3, np.float32), k, bins)


def test_no_scores_to_cluster() -> None:
    with pytest.raises(ValueError, match="no block"):
        _C.cluster(np.full(3, np.nan, np.float32))
