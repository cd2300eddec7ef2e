"""Weighted orders against probabilities from the definition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_lfr import _C
from support.order_oracles import chi_square, clusters_of, inclusion_probabilities, probabilities

Scores = npt.NDArray[np.float32]
Order = npt.NDArray[np.unsignedinteger]

CUTS = [1.0, 2.5]


def draw_visits(
    scores: Scores, cuts: list[float], mass: list[float], unseen_mass: float, cap: float, samples: int, seed: int
) -> Order:
    return _C.order_visits(_C.BlockWeights(scores, cuts, cap), mass, unseen_mass, samples, seed)


def draw_choice(
    scores: Scores, cuts: list[float], mass: list[float], unseen_mass: float, cap: float, samples: int, seed: int
) -> Order:
    return _C.order_choice(_C.BlockWeights(scores, cuts, cap), mass, unseen_mass, samples, seed)


scores_lists = st.lists(
    st.one_of(st.floats(-5, 12, width=32), st.sampled_from([1.0, 2.5, float("nan")])), min_size=1, max_size=50
)
masses = st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=3, max_size=3)
seeds = st.integers(0, 2**64 - 1)


@given(
    values=scores_lists,
    mass=masses,
    unseen_mass=st.sampled_from([0.0, 2.0]),
    cap=st.sampled_from([-1.0, 3.0, 100.0, float("inf")]),
    samples=st.integers(0, 3000),
    seed=seeds,
)
def test_visits_are_the_expectation_rounded(
    values: list[float], mass: list[float], unseen_mass: float, cap: float, samples: int, seed: int
) -> None:
    scores = np.array(values, np.float32)
    drawable = np.array([*mass, unseen_mass])[clusters_of(scores, CUTS)] > 0
    assume(drawable.any())
    order = draw_visits(scores, CUTS, mass, unseen_mass, cap, samples, seed)
    check_visits(order, scores, samples * probabilities(scores, CUTS, mass, unseen_mass, cap), samples)


@pytest.mark.parametrize("samples", [1_000, 900_000, 3_000_000])
def test_visits_of_many_blocks(samples: int) -> None:
    rng = np.random.default_rng(0)
    scores = rng.gamma(9, 0.35, 800_000).astype(np.float32)
    scores[rng.random(len(scores)) < 0.1] = np.nan
    order = draw_visits(scores, CUTS, [0.0, 1.0, 3.0], 0.5, 6.0, samples, 11)
    check_visits(order, scores, samples * probabilities(scores, CUTS, [0.0, 1.0, 3.0], 0.5, 6.0), samples)


def check_visits(
    order: npt.NDArray[np.unsignedinteger],
    scores: npt.NDArray[np.float32],
    expected: npt.NDArray[np.float64],
    samples: int,
) -> None:
    """Check that blocks and clusters are visited floor or ceil of the expected times, up to a fixed-point unit."""
    slack = 1e-6
    assert len(order) == samples
    visits = np.bincount(order, minlength=len(scores))
    assert (visits >= np.floor(expected - slack)).all()
    assert (visits <= np.ceil(expected + slack)).all()
    clusters = clusters_of(scores, CUTS)
    per_cluster = np.bincount(clusters, weights=visits, minlength=4)
    expected_per_cluster = np.bincount(clusters, weights=expected, minlength=4)
    assert (per_cluster >= np.floor(expected_per_cluster - slack)).all()
    assert (per_cluster <= np.ceil(expected_per_cluster + slack)).all()
    assert visits[expected == 0].sum() == 0


def test_mean_visits_over_seeds_are_the_expectation() -> None:
    scores = np.array([0.3, 1.0, 1.7, 2.0, 2.6, 4.0, np.nan, np.nan], np.float32)
    arguments = (CUTS, [1.0, 2.0, 3.0], 1.5, 3.5)
    expected = 7 * probabilities(scores, *arguments)
    rounds = 4000
    visits = np.zeros(len(scores))
    for seed in range(rounds):
        visits += np.bincount(draw_visits(scores, *arguments, 7, seed), minlength=len(scores))
    fraction = expected - np.floor(expected)
    deviation = np.sqrt(fraction * (1 - fraction) / rounds)
    assert (np.abs(visits / rounds - expected) < 5 * deviation + 1e-9).all()


def test_far_below_the_cap_weights_do_not_underflow() -> None:
    scores = np.array([-3000.0, -3000.0, -2000.0, 5.0], np.float32)
    order = draw_visits(scores, [-2500.0, 0.0], [2.0, 1.0, 1.0], 0.0, 700.0, 400, 0)
    assert np.bincount(order, minlength=4).tolist() == [100, 100, 100, 100]
    chosen = draw_choice(scores, [-2500.0, 0.0], [2.0, 1.0, 1.0], 0.0, 700.0, 4, 0)
    assert sorted(chosen.tolist()) == [0, 1, 2, 3]


def test_the_whole_phase_is_shuffled() -> None:
    """Visits of one block are spread over the phase, and no cluster comes first."""
    scores = np.repeat(np.array([0.0, 2.0, 3.0], np.float32), 100)
    order = draw_visits(scores, CUTS, [1.0, 1.0, 1.0], 0.0, 9.0, 9000, 5)
    places = [np.flatnonzero(clusters_of(scores[order], CUTS) == c).mean() for c in range(3)]
    assert np.abs(np.array(places) - 4500).max() < 5 * 9000 / np.sqrt(12 * 3000)


@pytest.mark.parametrize(
    ("values", "samples", "rounds"),
    [([0.2, 1.5, 2.0, 3.0, np.nan], 2, 40_000), ([0.2, 1.5, 2.0, 3.0, np.nan, 0.9], 3, 8_000)],
)
def test_choice_includes_blocks_as_successive_sampling_would(values: list[float], samples: int, rounds: int) -> None:
    scores = np.array(values, np.float32)
    arguments = (CUTS, [0.5, 2.0, 2.0], 0.7, 2.8)
    expected = inclusion_probabilities(probabilities(scores, *arguments).tolist(), samples)
    included, first = np.zeros(len(scores)), np.zeros(len(scores))
    for seed in range(rounds):
        ids = draw_choice(scores, *arguments, samples, seed)
        included[ids] += 1
        first[ids[0]] += 1
    assert (np.abs(included - rounds * expected) < 5 * np.sqrt(rounds * expected * (1 - expected))).all()
    # Heavy blocks must not come first: each place is equally likely for a chosen block.
    assert (np.abs(first - included / samples) < 5 * np.sqrt(included * (samples - 1)) / samples).all()


@pytest.mark.parametrize(
    "seed", [0xDA633FC8AD6DCFDC, 0xACAE99EC7306F6E6]
)  # whose offsets are the least and the greatest
def test_rounded_shares_lose_no_sample(seed: int) -> None:
    """In doubles, six sixths are less than 1: the difference must neither go to a removed cluster nor be lost."""
    scores = np.array([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, np.nan], np.float32)
    assert sum([1 / 6] * 6) < 1
    order = draw_visits(scores, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6 + [0.0], 0.0, 9.0, 2**20, seed)
    visits = np.bincount(order, minlength=8)
    assert set(visits[:6].tolist()) == {2**20 // 6, 2**20 // 6 + 1}
    assert visits[6:].tolist() == [0, 0]


@pytest.mark.parametrize("draw", [draw_visits, draw_choice])
def test_arrangements_are_equally_likely(draw: Callable[..., Order]) -> None:
    rounds = 6000
    scores = np.full(3, 2.0, np.float32)
    counts = Counter(tuple(draw(scores, [], [1.0], 0.0, 9.0, 3, seed).tolist()) for seed in range(rounds))
    assert len(counts) == 6
    assert chi_square(list(counts.values()), rounds / 6) < 26  # 99.99th percentile for 5 degrees of freedom


def test_choice_beyond_a_pass_ends_with_a_weighted_one() -> None:
    """With two blocks of weights 3 : 1, the third sample is the first block with probability 3/4."""
    scores = np.array([5.0, 0.0, -1.0], np.float32)
    rounds, heavy, orders = 4000, 0, set()
    for seed in range(rounds):
        ids = draw_choice(scores, [-0.5, 1.0], [0.0, 1.0, 3.0], 1.0, 700.0, 5, seed).tolist()
        assert sorted(ids[:2]) == sorted(ids[2:4]) == [0, 1]
        orders.add((ids[0], ids[2]))
        heavy += ids[4] == 0
    assert len(orders) == 4
    assert abs(heavy - 0.75 * rounds) < 5 * np.sqrt(0.1875 * rounds)


@given(
    values=scores_lists, mass=masses, unseen_mass=st.sampled_from([0.0, 2.0]), samples=st.integers(0, 120), seed=seeds
)
def test_choice_draws_without_replacement(
    values: list[float], mass: list[float], unseen_mass: float, samples: int, seed: int
) -> None:
    scores = np.array(values, np.float32)
    drawable = np.flatnonzero(np.array([*mass, unseen_mass])[clusters_of(scores, CUTS)] > 0)
    assume(len(drawable) > 0)
    order = draw_choice(scores, CUTS, mass, unseen_mass, 6.0, samples, seed)
    assert len(order) == samples
    for first in range(0, samples, len(drawable)):
        part = order[first : first + len(drawable)]
        assert len(set(part.tolist())) == len(part)
        assert np.isin(part, drawable).all()


def test_choice_of_many_blocks_favours_heavy_ones_by_their_weight() -> None:
    """When few of many are chosen, a block's chance is its weight: the shares of clusters show it."""
    rng = np.random.default_rng(3)
    scores = rng.gamma(9, 0.35, 600_000).astype(np.float32)
    order = draw_choice(scores, CUTS, [1.0, 2.0, 5.0], 0.0, 6.0, 4000, 1)
    assert len(set(order.tolist())) == 4000
    shares = np.bincount(clusters_of(scores[order], CUTS), minlength=3) / 4000
    expected = np.array([1, 2, 5]) / 8
    assert (np.abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000) + 0.005).all()


def test_a_larger_choice_holds_the_smaller_one() -> None:
    """The key of a block does not depend on `samples`, and the ways to choose few or many agree."""
    scores = np.random.default_rng(4).normal(3, 1, 1_000_000).astype(np.float32)
    scores[::50] = np.nan
    chosen: set[int] = set()
    for samples in (100, 5000, 150_000, 700_000, 979_950):
        order = draw_choice(scores, CUTS, [1.0, 2.0, 5.0], 1.0, 6.0, samples, 8).tolist()
        assert len(set(order)) == samples
        assert chosen < set(order)
        chosen = set(order)


@pytest.mark.parametrize("sampled_are", ["hard", "easy"])
def test_a_choice_that_samples_mislead(sampled_are: str) -> None:
    """Every 64th batch of blocks is unlike the others, but the choice is right all the same."""
    batch, every = 2048, 64 * 2048
    hard = np.zeros(1_200_000, np.bool_)
    for first in range(0, len(hard), every):
        hard[first : first + batch] = True
    if sampled_are == "easy":
        hard = ~hard
    scores = np.where(hard, 12.0, 0.0).astype(np.float32)
    few = min(hard.sum(), (~hard).sum())
    samples = int(few * 3)
    order = draw_choice(scores, [], [1.0], 0.0, 20.0, samples, 2)
    assert len(set(order.tolist())) == samples
    of_hard = int(hard[order].sum())
    assert of_hard == (hard.sum() if sampled_are == "hard" else samples)  # e^12 times as heavy
    if sampled_are == "hard":  # the rest is a uniform choice of the easy ones
        easy = np.sort(order[~hard[order]])
        halves = np.histogram(easy, [0, 600_000, 1_200_000])[0] / len(easy)
        assert abs(halves[0] - 0.5) < 0.01
