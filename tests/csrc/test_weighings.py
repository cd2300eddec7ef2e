"""Orders by the rules and factors of `BlockWeights`, weights from outside, and copies, against their definitions."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_lfr import _C
from support.order_oracles import clusters_of, inclusion_probabilities, probabilities

Floats = npt.NDArray[np.float32]

CUTS = [1.0, 2.5]
RULES = ["perplexity", "uniform", "capped"]
scores_lists = st.lists(
    st.one_of(st.floats(-5, 12, width=32), st.sampled_from([1.0, 2.5, float("nan")])), min_size=1, max_size=40
)
bounds = st.sampled_from([(0.0, 4.0), (2.0, 2.0), (-3.0, 1.5)])
factor = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1 / 64, 1, width=32))
seeds = st.integers(0, 2**64 - 1)


def weigh(
    scores: Floats, rule: str, between: tuple[float, float], factors: Floats | None, threads: int = 0
) -> _C.BlockWeights:
    return _C.BlockWeights(scores, CUTS, 3.0, threads, rule, *between, factors)


@given(
    data=st.data(),
    values=scores_lists,
    rule=st.sampled_from(RULES),
    between=bounds,
    mass=st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=3, max_size=3),
    unseen_mass=st.sampled_from([0.0, 2.0]),
    samples=st.integers(0, 2000),
    seed=seeds,
)
def test_visits_and_choices_follow_rule_and_factors(
    data: st.DataObject,
    values: list[float],
    rule: str,
    between: tuple[float, float],
    mass: list[float],
    unseen_mass: float,
    samples: int,
    seed: int,
) -> None:
    scores = np.array(values, np.float32)
    size = len(scores)
    factors = np.array(data.draw(st.lists(factor, min_size=size, max_size=size)), np.float32)
    some = None if data.draw(st.booleans()) else factors
    drawable = np.array([*mass, unseen_mass])[clusters_of(scores, CUTS)] > 0
    drawable &= np.bool_(True) if some is None else factors > 0
    assume(drawable.any())
    weights = weigh(scores, rule, between, some)
    expected = samples * probabilities(scores, CUTS, mass, unseen_mass, 3.0, rule, between, some)
    visits = np.bincount(_C.order_visits(weights, mass, unseen_mass, samples, seed, 1), minlength=size)
    assert visits.sum() == samples
    slack = 1e-4 + 1e-6 * expected
    assert (visits >= np.floor(expected - slack)).all()
    assert (visits <= np.ceil(expected + slack)).all()
    assert not visits[~drawable].any()
    order = _C.order_choice(weights, mass, unseen_mass, samples, seed, 1)
    for first in range(0, samples, int(drawable.sum())):
        part = order[first : first + int(drawable.sum())]
        assert len(set(part.tolist())) == len(part)
        assert drawable[part].all()


@given(data=st.data(), values=scores_lists, rule=st.sampled_from(RULES), between=bounds)
def test_means_are_those_of_the_weights(
    data: st.DataObject, values: list[float], rule: str, between: tuple[float, float]
) -> None:
    scores = np.array(values, np.float32)
    factors = np.array(data.draw(st.lists(factor, min_size=len(scores), max_size=len(scores))), np.float32)
    weights = weigh(scores, rule, between, factors)
    drawn = factors > 0
    clusters = clusters_of(scores, CUTS)
    known = np.where(np.isnan(scores), 0, scores.astype(np.float64))
    each = np.ones(len(scores))
    if rule == "perplexity":
        each = np.exp(np.minimum(known, 3.0))
    elif rule == "capped":
        width = between[1] - between[0]
        each = (1 + (2 * np.clip((known - between[0]) / width, 0, 1) if width else 0)) / 3 + 0 * known
    each[np.isnan(scores)] = 1.0
    expected = [
        float((each * factors)[drawn & (clusters == c)].mean()) if (drawn & (clusters == c)).any() else 0.0
        for c in range(4)
    ]
    assert weights.mean_weights() == pytest.approx(expected, rel=1e-5, abs=0)
    assert weights.counts.tolist() == [int((drawn & (clusters == c)).sum()) for c in range(3)]
    assert weights.unseen == int((drawn & (clusters == 3)).sum())


@pytest.mark.parametrize("rule", ["uniform", "capped"])
def test_a_choice_includes_blocks_as_successive_sampling_would(rule: str) -> None:
    scores = np.array([0.2, 1.5, 2.0, 3.0, np.nan, 0.9], np.float32)
    factors = np.array([1.0, 0.5, 0.25, 1.0, 0.5, 0.0], np.float32)
    rounds, between, masses = 6_000, (0.0, 2.5), ([0.5, 2.0, 2.0], 0.7)
    chance = probabilities(scores, CUTS, *masses, 3.0, rule, between, factors)[:5].tolist()
    expected = inclusion_probabilities(chance, 2)
    weights = weigh(scores, rule, between, factors)
    included = np.zeros(6)
    for seed in range(rounds):
        included[_C.order_choice(weights, *masses, 2, seed, 1)] += 1
    assert included[5] == 0
    assert (np.abs(included[:5] - rounds * expected) < 5 * np.sqrt(rounds * expected * (1 - expected))).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_factors", [False, True])
def test_the_same_orders_for_any_number_of_threads(rule: str, with_factors: bool) -> None:
    rng = np.random.default_rng(8)
    scores = rng.normal(2, 1, 700_000).astype(np.float32)
    scores[::30] = np.nan
    factors = np.where(rng.random(len(scores)) < 0.2, 0, rng.random(len(scores))).astype(np.float32)
    for make in (_C.order_visits, _C.order_choice):
        orders = [
            make(weigh(scores, rule, (1.0, 3.5), factors if with_factors else None, threads), [0.0, 1.0, 2.0], 0.1,
                 200_000, 3, threads)
            for threads in (1, 2, 5)
        ]  # fmt: skip
        assert np.array_equal(orders[0], orders[1])
        assert np.array_equal(orders[0], orders[2])
        if with_factors:
            assert (factors[orders[0]] > 0).all()


@given(
    values=st.lists(st.one_of(st.just(0.0), st.floats(2**-20, 2**20, width=32)), min_size=1, max_size=50),
    power=st.sampled_from([0.25, 1.0, 1.7, 3.0]),
    cap=st.sampled_from([1.0, 1.5, 4.0, math.inf]),
)
def test_weights_are_raised_capped_and_scaled(values: list[float], power: float, cap: float) -> None:
    weights = np.array(values, np.float32)
    assume(weights.any())
    raised = weights.astype(np.float64) ** power
    capped = np.minimum(raised, cap * raised.mean())
    actual = _C.temper_weights(weights, power, cap)
    assert actual == pytest.approx(capped / capped.max(), rel=1e-6, abs=1e-37)
    assert actual.max() == 1
    assert np.array_equal(actual == 0, weights == 0)


def test_the_logarithm_behind_powers_is_exact_over_its_range() -> None:
    weights = np.geomspace(1e-30, 1.0, 200_000).astype(np.float32)
    for threads in (1, 3):
        actual = _C.temper_weights(weights, 0.3, math.inf, threads)
        assert np.allclose(actual, weights.astype(np.float64) ** 0.3, rtol=1e-7, atol=0)


@given(
    groups=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    logarithmic=st.booleans(),
    start=st.integers(0, 2**60),
    excluded=st.sets(st.integers(0, 59)),
)
def test_each_copy_has_its_turn(groups: list[int], logarithmic: bool, start: int, excluded: set[int]) -> None:
    factors = np.array([0.0 if block in excluded else 0.5 for block in range(len(groups))], np.float32)
    drawn = [block for block in range(len(groups)) if block not in excluded]
    array, sizes = np.array(groups, np.uint32), Counter(groups[block] for block in drawn)
    counted = {group: 1 + int(math.log2(size)) if logarithmic else 1 for group, size in sizes.items()}
    turns = math.lcm(*sizes.values())
    assume(turns <= 5000)
    total = np.zeros(len(groups), np.int64)
    for turn in range(start, start + turns):
        visits = _C.take_turns(array, turn, logarithmic, factors if excluded else None)
        assert set(visits.tolist()) <= {0, 1}
        assert {group: int(visits[array == group].sum()) for group in sizes} == counted
        total += visits
    each = {group: turns * counted[group] // sizes[group] for group in sizes}
    assert total.tolist() == [0 if block in excluded else each[group] for block, group in enumerate(groups)]


@given(
    factors=st.lists(st.one_of(st.sampled_from([0.0, 1.0, 0.5, 2**-32]), st.floats(0, 1, width=32)), min_size=1),
    first=st.integers(0, 2**32 - 80),
    together=st.lists(st.integers(1, 5), max_size=15),
    seed=st.integers(0, 2**64 - 1),
)
def test_visits_are_spread_evenly_over_passes(factors: list[float], first: int, together: list[int], seed: int) -> None:
    """Over any passes after one another, a block comes as often as they are times its factor, rounded up or down."""
    array = np.array(factors, np.float32)
    total, passes = np.zeros(len(array), np.int64), 0
    for more in together:
        total += _C.visits_in_passes(array, first + passes, more, seed)
        passes += more
        for count, factor in zip(total.tolist(), array.tolist(), strict=True):
            exact = Fraction(int(Fraction(factor) * 2**32), 2**32) * passes
            assert math.floor(exact) <= count <= math.ceil(exact)


def test_in_which_passes_a_block_comes_is_random() -> None:
    factors = np.tile(np.array([0.25, 0.5, 0.9], np.float32), 100_000)
    for number in (0, 1, 7):
        visits = _C.visits_in_passes(factors, number, 1, 3, 1)
        assert np.array_equal(visits, _C.visits_in_passes(factors, number, 1, 3, 5))
        assert (visits != _C.visits_in_passes(factors, number, 1, 4)).mean() == pytest.approx(0.3517, abs=0.005)
        assert visits.reshape(-1, 3).mean(0) == pytest.approx([0.25, 0.5, 0.9], abs=0.006)
        assert abs(np.corrcoef(visits.reshape(-1, 3).T) - np.eye(3)).max() < 0.015


def test_groups_do_not_all_begin_with_their_first_block() -> None:
    first = _C.take_turns(np.repeat(np.arange(1000, dtype=np.uint32), 4), 0, False).reshape(1000, 4)
    assert (first.sum(0) > 150).all()


ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.threshold(ONES, 0.5, drop_hardest=0.5), "drop_hardest"),
        (lambda: _C.threshold(ONES, 0.5, drop_hardest=-0.1), "drop_hardest"),
        (lambda: _C.order_threshold(ONES, 0.5, True, 1, 0, drop_hardest=math.nan), "drop_hardest"),
        (lambda: _C.BlockWeights(ONES, [], 1.0, rule="other"), "rule"),
        (lambda: _C.BlockWeights(ONES, [], 1.0, rule="capped", low=2.0, high=1.0), "low, high"),
        (lambda: _C.BlockWeights(ONES, [], 1.0, rule="capped", low=-3e38, high=3e38), "low, high"),
        (lambda: _C.BlockWeights(ONES, [], 1.0, factors=np.ones(2, np.float32)), "factors"),
        (lambda: _C.BlockWeights(ONES, [], 1.0, factors=np.ones(3)), "factors"),
        (lambda: _C.temper_weights(np.zeros(3, np.float32), 1.0, 4.0), "all are 0"),
        (lambda: _C.temper_weights(np.array([1, -1], np.float32), 1.0, 4.0), "block 1 has"),
        (lambda: _C.temper_weights(np.array([1, np.nan], np.float32), 1.0, 4.0), "block 1 has"),
        (lambda: _C.temper_weights(np.array([np.inf], np.float32), 1.0, 4.0), "block 0 has"),
        (lambda: _C.temper_weights(ONES, 0.0, 4.0), "power"),
        (lambda: _C.temper_weights(ONES, 1.0, 0.5), "cap"),
        (lambda: _C.visits_in_passes(np.array([1, 1.5], np.float32), 0, 1, 0), "block 1 has"),
        (lambda: _C.visits_in_passes(np.array([np.nan], np.float32), 0, 1, 0), "block 0 has"),
        (lambda: _C.visits_in_passes(ONES, 2**32, 1, 0), "first, passes"),
        (lambda: _C.visits_in_passes(ONES, 0, 2**32, 0), "first, passes"),
        (lambda: _C.visits_in_passes(ONES, -1, 1, 0), "first"),
        (lambda: _C.visits_in_passes(np.ones(3), 0, 1, 0), "factors"),
        (lambda: _C.take_turns(np.zeros(3, np.int64), 0, False), "groups"),
        (lambda: _C.take_turns(np.zeros(3, np.uint32), -1, False), "turn"),
        (lambda: _C.take_turns(np.zeros(3, np.uint32), 0, False, np.ones(2, np.float32)), "factors"),
    ],
)
def test_illegal_arguments_are_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
