"""Likeness of sets of blocks, against Python's sets and vectors of zeros and ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.lfr.blocksets import BlockSet, compare


def mask_of(members: set[int], n_blocks: int) -> np.ndarray:
    return np.array([i in members for i in range(n_blocks)], np.bool_)


@given(n_blocks=st.integers(1, 40), data=st.data())
def test_against_sets(n_blocks: int, data: st.DataObject) -> None:
    a, b = (data.draw(st.sets(st.integers(0, n_blocks - 1))) for _ in range(2))
    masks = mask_of(a, n_blocks), mask_of(b, n_blocks)
    found = compare(BlockSet.of(masks[0]), BlockSet.of(masks[1]))
    if not a or not b:
        assert math.isnan(found.overlap)
        assert math.isnan(found.cosine)
        return
    assert found.overlap == pytest.approx(len(a & b) / len(a | b))
    u, v = (mask.astype(float) for mask in masks)
    assert found.cosine == pytest.approx(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))


def test_chance_is_what_random_sets_have(rng: np.random.Generator) -> None:
    n_blocks = 20_000
    sets = [BlockSet.of(rng.permutation(n_blocks) < size) for size in (5000, 14000)]
    found = compare(*sets)
    assert found.cosine == pytest.approx(found.by_chance, abs=0.01)


def test_sets_of_different_corpora_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(BlockSet.of(np.ones(3, np.bool_)), BlockSet.of(np.ones(4, np.bool_)))
