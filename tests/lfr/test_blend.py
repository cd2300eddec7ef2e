"""Corpora with weights: quotas, complete passes within each corpus, and a Focus over all of them or over each."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.lfr import Blend, BlendSelection, Phase, make_order, preset
from megatron_lfr.lfr.blend import place_ids

STARTS = [0, 300, 1000, 1040]
REVIEW = Phase("review", 1)


def scores_of(n: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(3.0, 0.8, n).astype(np.float32)


def by_corpus(order: npt.NDArray[np.unsignedinteger], starts: list[int] = STARTS) -> list[npt.NDArray[np.int64]]:
    """Split an order into those of the corpora, with ids counted from the first block of each."""
    ids = order.astype(np.int64)
    return [ids[(ids >= a) & (ids < b)] - a for a, b in itertools.pairwise(starts)]


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=8),
    samples=st.integers(0, 10**12),
)
def test_quotas_are_the_weights_shares_rounded(weights: list[int], samples: int) -> None:
    quotas = Blend(list(range(len(weights) + 1)), weights).quotas(samples)
    assert sum(quotas) == samples
    for quota, weight in zip(quotas, weights, strict=True):
        assert abs(quota - Fraction(samples * weight, sum(weights))) <= 1 + Fraction(samples, 2**50)


@pytest.mark.parametrize("samples", [1, 7, 1000, 5000])
def test_learn_fills_quotas_by_complete_passes(samples: int) -> None:
    blend = Blend(STARTS, [0.5, 0.2, 0.3])
    order, selection = blend.make_order(REVIEW, scores_of(1040), samples, seed=3, phase_index=2)
    assert selection is None
    assert len(order) == samples
    served = by_corpus(order)
    assert [len(ids) for ids in served] == blend.quotas(samples)
    for ids, size in zip(served, blend.sizes, strict=True):
        for first in range(0, len(ids), size):  # each pass ends before the next begins
            part = ids[first : first + size]
            assert len(set(part.tolist())) == len(part)
        if len(ids) >= 2 * size > 100:
            assert not np.array_equal(ids[:size], ids[size : 2 * size])


def test_corpora_are_mixed_throughout() -> None:
    order, _ = Blend([0, 50_000, 100_000], [1, 3]).make_order(REVIEW, scores_of(100_000), 40_000, 5, 0)
    share = (order < 50_000).reshape(40, -1).mean(axis=1)
    assert np.abs(share - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / 1000)


def test_a_part_of_a_pass_is_a_random_one() -> None:
    """Every block is as likely to be in the remainder as any other."""
    counts: Counter[int] = Counter()
    for seed in range(1000):
        order, _ = Blend([0, 10, 20], [1, 1]).make_order(REVIEW, scores_of(20), 26, seed, 0)
        counts.update(order.tolist())
    expected = 1000 * 1.3
    variance = 1000 * 0.3 * 0.7
    assert len(counts) == 20
    assert max(abs(count - expected) for count in counts.values()) < 4.5 * np.sqrt(variance)


@pytest.mark.parametrize("blend", [Blend([0, 1040]), Blend(STARTS), Blend([0, 1040], None, "global")])
def test_without_weights_every_block_counts_the_same(blend: Blend) -> None:
    for phase in (REVIEW, Phase("focus", 1, drop=0.5)):
        ours, _ = blend.make_order(phase, scores_of(1040), 1500, seed=3, phase_index=1)
        plain, _ = make_order(phase, scores_of(1040), 1500, 3, 1)
        assert np.array_equal(ours, plain)


def test_a_global_focus_does_not_know_the_weights() -> None:
    phase = Phase("focus", 1, drop=0.7, sampling="choice")
    ours, _ = Blend(STARTS, [1, 2, 3]).make_order(phase, scores_of(1040), 200, 3, 1)
    assert np.array_equal(ours, make_order(phase, scores_of(1040), 200, 3, 1)[0])


@pytest.mark.parametrize("sampling", ["passes", "visits", "choice"])
@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 2.0]])
@pytest.mark.parametrize("selection", ["threshold", "clusters"])
def test_focus_per_corpus_ranks_each_by_itself(sampling: str, weights: list[float] | None, selection: str) -> None:
    scores = scores_of(1040)
    scores[300:1000] += 5.0  # a global threshold would drop all of the others
    phase = Phase("focus", 1, drop=0.5, sampling=sampling, selection=selection)  # type: ignore[arg-type]
    blend = Blend(STARTS, weights, "per-corpus")
    order, left = blend.make_order(phase, scores, 100, 3, 1)
    assert isinstance(left, BlendSelection)
    served = by_corpus(order)
    assert [len(ids) for ids in served] == blend.quotas(100)
    mask = left.left_out(scores)
    for ids, first, last in zip(served, STARTS, STARTS[1:], strict=False):
        corpus = scores[first:last]
        if selection == "threshold":
            assert corpus[ids].min() >= np.sort(corpus)[len(corpus) // 2]
            assert mask[first:last].sum() == len(corpus) // 2
        assert not mask[first:last][ids].any()
    assert left.dropped == mask.sum()
    assert left.dropped_share == mask.mean()


@pytest.mark.parametrize(
    "phase",
    [
        Phase("focus", 1, drop=0.5, selection="clusters", sampling="visits"),
        Phase("focus", 1, drop=0.4, drop_hardest=0.1, explore=0.2, guard="file:weight", guard_gain=0.1),
        *(phase for phase in preset("lfr").phases if phase.kind == "focus"),  # may be declined, and goes on with passes
    ],
)
def test_a_corpus_without_scores_is_drawn_from_uniformly(phase: Phase) -> None:
    scores = scores_of(1040)
    scores[1000:] = np.nan
    order, left = Blend(STARTS, [1, 1, 1], "per-corpus").make_order(phase, scores, 120, 3, 1)
    assert sorted(by_corpus(order)[2].tolist()) == list(range(40))
    assert left is not None
    assert left.unseen == 40
    assert not left.left_out(scores)[1000:].any()


def test_orders_depend_on_the_seed_and_the_phase() -> None:
    orders = {
        tuple(Blend(STARTS, [1, 1, 1]).make_order(REVIEW, scores_of(1040), 90, seed, phase)[0].tolist())
        for seed in (1, 2)
        for phase in (0, 1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("starts", "weights", "scope", "fault"),
    [
        ([0], None, "global", "at least one corpus"),
        ([0, 5, 5], None, "global", "without a block"),
        ([0, 5], [1.0, 2.0], "global", "2 weights for 1 corpora"),
        ([0, 5], [0.0], "global", "positive"),
        ([0, 5], [float("inf")], "global", "positive"),
        ([0, 5], None, "local", "global, per-corpus"),
    ],
)
def test_bad_blends(starts: list[int], weights: list[float] | None, scope: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Blend(starts, weights, scope)  # type: ignore[arg-type]


def test_ids_beyond_32_bits_do_not_wrap() -> None:
    """Of a corpus that has fewer blocks, and comes after billions of others."""
    part = np.uint32([0, 7, 2**32 - 2])
    for first in (3 * 10**9, 5 * 10**9):
        ids = np.empty(3, np.uint64)
        place_ids(part, first, ids)
        assert ids.tolist() == [first, first + 7, first + 2**32 - 2]
