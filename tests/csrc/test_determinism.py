"""The same bits for any number of threads, and a hash that notices every change."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lfr import _C
from support.order_samples import CAP, ORDERS, spread_scores


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("threads", [2, 7])
def test_threads_change_no_order(name: str, threads: int) -> None:
    scores = spread_scores(1_200_000)  # five chunks, many buckets
    assert np.array_equal(ORDERS[name](scores, threads), ORDERS[name](scores, 1))


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_change_no_statistic(threads: int) -> None:
    scores = spread_scores(1_200_000)
    cuts = _C.cluster(scores, num_threads=1)
    assert np.array_equal(_C.cluster(scores, num_threads=threads), cuts)
    one, several = _C.BlockWeights(scores, cuts, CAP, 1), _C.BlockWeights(scores, cuts, CAP, threads)
    assert np.array_equal(one.counts, several.counts)
    assert np.array_equal(one.mean_weights(1), several.mean_weights(threads))
    shares = (0.9, 0.1, 0.5, 0.9)
    np.testing.assert_array_equal(_C.percentiles(scores, shares, 1), _C.percentiles(scores, shares, threads))
    assert _C.threshold(scores, 0.9, 1) == _C.threshold(scores, 0.9, threads)
    ids = np.arange(1_200_000, dtype=np.uint32)
    assert _C.order_hash(ids, 1) == _C.order_hash(ids, threads)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_first_infinite_score_is_named(threads: int) -> None:
    scores = np.zeros(2_000_000, np.float32)
    scores[[700_001, 1_900_000]] = [np.inf, -np.inf]
    with pytest.raises(ValueError, match="block 700001 "):
        _C.threshold(scores, 0.5, threads)


def test_hash_is_that_of_the_values() -> None:
    ids = _C.permutation(600_000, 1)
    assert _C.order_hash(ids) == _C.order_hash(ids.astype(np.uint64))


def test_hash_notices_every_small_change() -> None:
    ids = np.arange(300, dtype=np.uint32)
    variants = [
        ids,
        ids[:-1],
        ids[1:],
        np.append(ids, np.uint32(0)),
        ids[:0],
        ids[:1],
        np.append(ids, ids),
        ids[::-1].copy(),
    ]
    for i in range(300):
        changed = ids.copy()
        changed[i] ^= 1
        variants.append(changed)
        swapped = ids.copy()
        swapped[[i, (7 * i + 1) % 300]] = swapped[[(7 * i + 1) % 300, i]]
        if not np.array_equal(swapped, ids):
            variants.append(swapped)
    distinct = {variant.tobytes() for variant in variants}
    assert len({_C.order_hash(variant) for variant in variants}) == len(distinct)


def test_hash_notices_a_swap_across_chunks() -> None:
    ids = np.zeros(600_000, np.uint32)
    ids[10] = 1
    moved = np.zeros(600_000, np.uint32)
    moved[10 + 2**18] = 1
    assert _C.order_hash(ids) != _C.order_hash(moved)
