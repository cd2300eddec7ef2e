"""Likeness of sets of blocks, against Python's sets and vectors of zeros and ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.analysis.similarity import BlockSet, compare


def mask_of(members: set[int], n_blocks: int) -> np.ndarray:
    return np.array([i in members for i in range(n_blocks)], np.bool_)


@given(n_blocks=st.integers(1, 40), data=st.data())
def test_against_sets(n_blocks: int, data: st.DataObject) -> None:
    a, b = (data.draw(st.sets(st.integers(0, n_blocks - 1))) for _ in range(2))
    masks = mask_of(a, n_blocks), mask_of(b, n_blocks)
    likeness = compare(*(BlockSet.of(mask, np.ones(n_blocks, np.bool_)) for mask in masks))
    if not a or not b:
        assert math.isnan(likeness.overlap)
        assert math.isnan(likeness.cosine)
        return
    assert likeness.overlap == pytest.approx(len(a & b) / len(a | b))
    u, v = (mask.astype(float) for mask in masks)
    assert likeness.cosine == pytest.approx(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))


@pytest.mark.parametrize(
    ("scored", "sizes"), [((20, 20), (5, 14)), ((7, 20), (3, 12)), ((9, 12), (4, 6)), ((5, 5), (2, 2))]
)
def test_chance_is_what_random_sets_have(
    scored: tuple[int, int], sizes: tuple[int, int], rng: np.random.Generator
) -> None:
    """Sets of this many thousand blocks are chosen at random from 20 thousand blocks that have a score."""
    n_blocks = 20_000
    candidates = [rng.permutation(n_blocks) < 1000 * thousands for thousands in scored]
    candidates[1] |= candidates[0] & (rng.random(n_blocks) < 0.5)  # scored sets have much in common
    sets = []
    for among, thousands in zip(candidates, sizes, strict=True):
        mask = np.zeros(n_blocks, np.bool_)
        mask[rng.permutation(np.flatnonzero(among))[: 1000 * thousands]] = True
        sets.append(BlockSet.of(mask, among))
    likeness = compare(*sets)
    assert likeness.cosine == pytest.approx(likeness.by_chance, abs=0.015)


def test_chance_of_sets_that_were_chosen_in_each_corpus(rng: np.random.Generator) -> None:
    """One was chosen by thirds and halves in two corpora, the other in three; against many random samples."""
    n_blocks, parts = 400, [((0, 100, 400), (1 / 3, 1 / 2)), ((0, 100, 250, 400), (0.8, 0.1, 0.5))]
    candidates = [rng.random(n_blocks) < share for share in (0.7, 0.5)]
    candidates[0][:100] = rng.random(100) < 0.2
    cosines, expected = [], 0.0
    for _ in range(400):
        sets = []
        for among, (starts, shares) in zip(candidates, parts, strict=True):
            mask = np.zeros(n_blocks, np.bool_)
            for first, last, share in zip(starts, starts[1:], shares, strict=False):
                inside = first + np.flatnonzero(among[first:last])
                mask[rng.permutation(inside)[: int(share * len(inside))]] = True
            sets.append(BlockSet.of(mask, among, starts))
        likeness = compare(*sets)
        cosines.append(likeness.cosine)
        expected = likeness.by_chance
    assert np.mean(cosines) == pytest.approx(expected, abs=0.005)


def test_sets_of_different_corpora_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(*(BlockSet.of(np.ones(n, np.bool_), np.ones(n, np.bool_)) for n in (3, 4)))
