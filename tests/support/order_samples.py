"""Every kind of order that the C++ core makes, of scores that are the same everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C

Order = npt.NDArray[np.unsignedinteger]


def spread_scores(n: int) -> npt.NDArray[np.float32]:
    """Scores in [0, 6) from integers alone: no generator whose stream might change."""
    scores = ((np.arange(n) * 2654435761 % 2**32) / 2**32 * 6).astype(np.float32)
    scores[::37] = np.nan
    return scores


def factors_of(scores: npt.NDArray[np.float32], threads: int) -> npt.NDArray[np.float32]:
    """Weights from outside that go with the scores, of which an eighth are 0."""
    weights = ((np.arange(len(scores)) * 1640531527 % 2**32) / 2**32).astype(np.float32)
    return _C.temper_weights(np.maximum(0, weights - np.float32(0.125)), 0.7, 1.5, threads)


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
    "order_threshold, both tails": lambda scores, threads: _C.order_threshold(
        scores, 0.3, True, len(scores) * 5 // 3, 7, threads, 0.2
    ),
    "order_visits, uniform with factors": lambda scores, threads: _C.order_visits(
        _C.BlockWeights(scores, CUTS, CAP, threads, "uniform", factors=factors_of(scores, threads)),
        *MASS,
        len(scores) * 2 // 3,
        7,
        threads,
    ),
    "order_choice, capped with factors": lambda scores, threads: _C.order_choice(
        _C.BlockWeights(scores, CUTS, CAP, threads, "capped", 0.5, 4.5, factors_of(scores, threads)),
        *MASS,
        len(scores) // 3,
        7,
        threads,
    ),
    "draw_distinct": lambda scores, threads: _C.draw_distinct(len(scores), len(scores) // 5, 8, threads),
    "take_turns": lambda scores, threads: np.flatnonzero(
        _C.take_turns(np.arange(len(scores), dtype=np.uint32) // 3, 7, True, factors_of(scores, threads))
    ).astype(np.uint32),
    "visits_in_passes": lambda scores, threads: np.flatnonzero(
        _C.visits_in_passes(factors_of(scores, threads), 2, 1, 7, threads)
    ).astype(np.uint32),
    "interleave": lambda scores, threads: _C.interleave(
        np.arange(len(scores), dtype=np.uint32), [len(scores) // 4, len(scores) * 3 // 4], 7, threads
    ),
}
