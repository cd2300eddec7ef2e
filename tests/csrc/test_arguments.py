"""Illegal arguments raise a ValueError that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_lfr import _C

SCORES = np.linspace(0, 5, 10, dtype=np.float32)
WEIGHTS = _C.BlockWeights(SCORES, [1.0], 5.0)
MASS = ([1.0, 2.0], 0.0)

OF_SCORES: dict[str, Callable[[Any], Any]] = {
    "threshold": lambda scores: _C.threshold(scores, 0.5),
    "order_threshold": lambda scores: _C.order_threshold(scores, 0.5, True, 5, 0),
    "BlockWeights": lambda scores: _C.BlockWeights(scores, [1.0], 5.0),
    "cluster": lambda scores: _C.cluster(scores),
    "percentiles": lambda scores: _C.percentiles(scores, [0.5]),
}


@pytest.mark.parametrize("function", OF_SCORES)
@pytest.mark.parametrize(
    "scores",
    [SCORES.astype(np.float64), SCORES[::2], SCORES.reshape(2, 5), SCORES.tolist(), SCORES.astype(">f4"), None],
    ids=["float64", "strided", "2-d", "list", "big-endian", "None"],
)
def test_scores_of_another_kind(function: str, scores: object) -> None:
    with pytest.raises(ValueError, match="scores: must be a contiguous array of type float32"):
        OF_SCORES[function](scores)


@pytest.mark.parametrize("function", OF_SCORES)
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_scores(function: str, value: float) -> None:
    scores = SCORES.copy()
    scores[[3, 7]] = value
    with pytest.raises(ValueError, match="block 3 has an infinite score"):
        OF_SCORES[function](scores)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: _C.permutation(-1, 0), "n"),
        (lambda: _C.permutation(2**63, 0), "n"),
        (lambda: _C.permutation(3, -1), "seed"),
        (lambda: _C.permutation(3, 2**64), "seed"),
        (lambda: _C.permutation(3, 0, -1), "num_threads"),
        (lambda: _C.permutation(3, 0, 10**6), "num_threads"),
        (lambda: _C.shuffle_visits(np.ones(3, np.int64), 0), "visits"),
        (lambda: _C.threshold(SCORES, 1.0), "drop"),
        (lambda: _C.threshold(SCORES, -0.1), "drop"),
        (lambda: _C.threshold(SCORES, float("nan")), "drop"),
        (lambda: _C.order_threshold(SCORES, 0.5, True, -1, 0), "samples"),
        (lambda: _C.order_visits(WEIGHTS, *MASS, -1, 0), "samples"),
        (lambda: _C.order_choice(WEIGHTS, *MASS, 2**64, 0), "samples"),
        (lambda: _C.percentiles(SCORES, [0.5, 1.01]), "q"),
        (lambda: _C.percentiles(SCORES, [float("nan")]), "q"),
        (lambda: _C.place_evenly(np.zeros(4, np.uint32), np.zeros(3, np.uint32)), "items"),
        (lambda: _C.place_evenly(np.zeros(2, np.uint32), np.zeros(3, np.uint64)), "order"),
        (lambda: _C.order_hash(np.arange(3)), "ids"),
    ],
)
def test_values_outside_their_range(call: Callable[[], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        call()


def test_numpy_integers_are_integers() -> None:
    assert _C.permutation(np.int64(5), np.uint64(2**64 - 1)).tolist() == _C.permutation(5, 2**64 - 1).tolist()


def test_read_only_and_mapped_scores_are_taken(tmp_path: Any) -> None:
    path = tmp_path / "scores.npy"
    np.save(path, SCORES)
    mapped = np.load(path, mmap_mode="r")
    assert _C.threshold(mapped, 0.5) == _C.threshold(SCORES, 0.5)


@pytest.mark.parametrize(
    ("cuts", "cap", "message"),
    [
        ([2.0, 1.0], 5.0, "cuts"),
        ([float("nan")], 5.0, "cuts"),
        ([0.1 * i for i in range(64)], 5.0, "cuts"),
        ([1.0], float("nan"), "cap"),
        ([1.0], float("-inf"), "cap"),
    ],
)
def test_illegal_weights(cuts: list[float], cap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.BlockWeights(SCORES, cuts, cap)


@pytest.mark.parametrize("draw", [_C.order_visits, _C.order_choice])
class TestRefusals:
    scores = np.array([0.0, 2.0, np.nan], np.float32)

    @pytest.mark.parametrize(
        ("cuts", "mass", "unseen_mass", "message"),
        [
            ([1.0], [1.0], 0.0, "mass"),
            ([1.0], [1.0, -1.0], 0.0, "mass"),
            ([1.0], [1.0, float("inf")], 0.0, "mass"),
            ([1.0], [1e308, 1e308], 0.0, "mass"),
            ([1.0], [0.0, 0.0], 0.0, "no block can be drawn"),
            ([3.0], [0.0, 1.0], 0.0, "no block can be drawn"),
            ([1.0], [1.0, 1.0], float("nan"), "unseen_mass"),
        ],
    )
    def test_illegal_masses(
        self, draw: Callable[..., Any], cuts: list[float], mass: list[float], unseen_mass: float, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            draw(_C.BlockWeights(self.scores, cuts, 5.0), mass, unseen_mass, 10, 0)

    def test_no_blocks_at_all(self, draw: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match="no block can be drawn"):
            draw(_C.BlockWeights(np.empty(0, np.float32), [], 5.0), [1.0], 1.0, 10, 0)

    def test_something_else_than_weights(self, draw: Callable[..., Any]) -> None:
        with pytest.raises(TypeError, match="BlockWeights"):
            draw(self.scores, [1.0], 1.0, 10, 0)


def test_scores_that_change_under_their_weights() -> None:
    """The sums belong to other scores, so an error is better than a wrong order."""
    scores = np.linspace(0, 5, 1000, dtype=np.float32)
    weights = _C.BlockWeights(scores, [1.0, 3.0], 5.0)
    scores[17] = 2.0
    with pytest.raises(ValueError, match="changed"):
        _C.order_visits(weights, [1.0, 1.0, 1.0], 0.0, 400, 0)
