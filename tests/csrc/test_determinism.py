"""The same bits for any number of threads, from one version to the next, and a hash that notices every change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr import _C

Order = npt.NDArray[np.unsignedinteger]


def spread_scores(n: int) -> npt.NDArray[np.float32]:
    """Scores in [0, 6) from integers alone: no generator whose stream might change."""
    scores = ((np.arange(n) * 2654435761 % 2**32) / 2**32 * 6).astype(np.float32)
    scores[::37] = np.nan
    return scores


CUTS, CAP = [1.0, 3.0], 5.0
MASS = ([1.0, 2.0, 3.0], 0.5)

ORDERS: dict[str, Callable[[npt.NDArray[np.float32], int], Order]] = {
    "permutation": lambda scores, threads: _C.permutation(len(scores), 7, threads),
    "shuffle_visits": lambda scores, threads: _C.shuffle_visits(
        (np.arange(len(scores)) % 4).astype(np.uint32), 7, threads
    ),
    "order_threshold": lambda scores, threads: _C.order_threshold(scores, 0.3, True, len(scores) * 5 // 3, 7, threads),
    "order_visits": lambda scores, threads: _C.order_visits(
        _C.BlockWeights(scores, CUTS, CAP, threads), *MASS, len(scores) * 2 // 3, 7, threads
    ),
    "order_choice": lambda scores, threads: _C.order_choice(
        _C.BlockWeights(scores, CUTS, CAP, threads), *MASS, len(scores) // 3, 7, threads
    ),
    "interleave": lambda scores, threads: _C.interleave(
        np.arange(len(scores), dtype=np.uint32), [len(scores) // 4, len(scores) * 3 // 4], 7, threads
    ),
}

# Orders of 300,000 blocks. A change here changes the order of every run that resumes: never a side effect.
GOLDEN = {
    "permutation": 0xEAF38EEF7AADADA7,
    "shuffle_visits": 0x0AA80BDB2FA93198,
    "order_threshold": 0x93A82F02C11ED135,
    "order_visits": 0x3B6952B5748EBD64,
    "order_choice": 0xC18E1C29DE2B00DA,
    "interleave": 0x6B3D6B7A00F18C59,
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_never_change(name: str) -> None:
    assert _C.order_hash(ORDERS[name](spread_scores(300_000), 0)) == GOLDEN[name]


def test_an_order_of_nested_buckets_never_changes() -> None:
    hashes = {_C.order_hash(_C.permutation(6_000_000, 7, threads)) for threads in (1, 7)}
    assert hashes == {0x3849C7EC01B8E88E}


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
    assert np.array_equal(one.mean_perplexity(1), several.mean_perplexity(threads))
    assert _C.percentile(scores, 0.9, 1) == _C.percentile(scores, 0.9, threads)
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
