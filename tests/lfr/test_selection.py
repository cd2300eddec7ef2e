"""Orders of a phase against brute-force selection in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr import _C
from megatron_lfr.lfr import Phase, make_order


def skewed_scores(n: int, unseen: int = 0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(2.0, 0.2, n - n // 4), rng.normal(5.0, 0.5, n // 4)]).astype(np.float32)
    rng.shuffle(scores)
    scores[rng.permutation(n)[:unseen]] = np.nan
    return scores


def hardest(scores: np.ndarray, drop: float) -> set[int]:
    """Return the ids that are kept when the floor(drop * scored) easiest scored blocks are dropped, ties by id."""
    scored = [int(i) for i in np.flatnonzero(~np.isnan(scores))]
    ranked = sorted(scored, key=lambda i: (scores[i], i))
    return set(ranked[int(drop * len(scored) + 1e-9) :])


@pytest.mark.parametrize("kind", ["learn", "review"])
def test_learn_and_review_visit_everything_once_a_pass(kind: str) -> None:
    order, selection = make_order(Phase(kind, 2.5), np.full(40, np.nan, np.float32), 100, 7, 3)  # type: ignore[arg-type]
    assert selection is None
    assert sorted(order[:40]) == sorted(order[40:80]) == list(range(40))
    assert len(set(order[80:])) == 20
    assert order[:40].tolist() != order[40:80].tolist()


@given(
    levels=st.lists(st.integers(0, 6), min_size=2, max_size=60),
    drop=st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.95]),
    unseen=st.sampled_from(["auto", "keep", "exclude"]),
    unscored=st.integers(0, 3),
)
def test_threshold_keeps_exactly_the_harder_blocks(levels: list[int], drop: float, unseen: str, unscored: int) -> None:
    scores = np.array(levels + [np.nan] * unscored, np.float32)
    phase = Phase("focus", 1, "passes", drop=drop, unseen=unseen)  # type: ignore[arg-type]
    kept = hardest(scores, drop) | (set(np.flatnonzero(np.isnan(scores)).tolist()) if unseen != "exclude" else set())
    order, selection = make_order(phase, scores, 2 * len(kept) + 1, 1, 1)
    assert set(order[: len(kept)].tolist()) == set(order[len(kept) : 2 * len(kept)].tolist()) == kept
    assert int(order[-1]) in kept
    assert selection is not None
    assert selection.dropped == len(levels) - len(hardest(scores, drop))
    assert selection.unseen == unscored
    assert set(np.flatnonzero(~selection.left_out(scores)).tolist()) == kept


@pytest.mark.parametrize("sampling", ["passes", "visits", "choice"])
@pytest.mark.parametrize("drop", [0.3, 0.5, 0.8])
def test_clusters_go_whole_and_never_beyond_the_drop(sampling: str, drop: float) -> None:
    scores = skewed_scores(2000)
    phase = Phase("focus", 1, drop=drop, selection="clusters", sampling=sampling)  # type: ignore[arg-type]
    order, selection = make_order(phase, scores, 900, 1, 1)
    assert selection is not None
    cuts = _C.cluster(scores, phase.clusters)
    counts = np.histogram(scores, [-np.inf, *cuts, np.inf])[0]
    removed = [c for c in range(len(counts)) if counts[: c + 1].sum() <= drop * len(scores)]
    assert selection.dropped == counts[: len(removed)].sum()
    assert selection.dropped_share <= drop
    assert selection.cut == cuts[len(removed) - 1]
    assert scores[order].min() >= selection.cut
    assert (selection.left_out(scores) == (scores < selection.cut)).all()


def test_cluster_visits_follow_perplexity() -> None:
    scores = skewed_scores(4000)
    phase = Phase("focus", 1, drop=0.5, selection="clusters", sampling="visits", weights="perplexity")
    order, selection = make_order(phase, scores, 3000, 1, 1)
    assert selection is not None
    kept = ~selection.left_out(scores)
    cap = np.sort(scores)[int(np.ceil(0.999 * len(scores))) - 1]
    cuts = _C.cluster(scores, phase.clusters)
    cluster = np.searchsorted(cuts, scores, side="right")
    weight = np.where(kept, np.exp(np.minimum(scores.astype(np.float64), cap)), 0.0)
    of_cluster = np.bincount(cluster, weight)
    mass = of_cluster
    expected = 3000 * (mass / mass.sum())[cluster] * weight / np.maximum(of_cluster, 1e-300)[cluster]
    visits = np.bincount(order, minlength=len(scores))
    assert len(order) == 3000
    assert (np.abs(visits - expected) < 1 + 1e-5).all()
    # A cluster's samples are its share up to the rounding of its blocks, each within one of its expectation.
    slack = 5 * 0.5 * np.sqrt(np.bincount(cluster, kept, minlength=len(mass)))
    assert (np.abs(np.bincount(cluster, visits, minlength=len(mass)) - 3000 * mass / mass.sum()) <= slack).all()


def test_weighted_choice_never_repeats_and_prefers_harder_blocks() -> None:
    scores = skewed_scores(2000)
    phase = Phase("focus", 1, drop=0.5, sampling="choice")
    order, selection = make_order(phase, scores, 600, 1, 1)
    assert selection is not None
    kept = scores >= selection.cut
    assert len(set(order.tolist())) == 600
    assert kept[order].all()
    assert scores[order].mean() > scores[kept].mean() + 0.3


@pytest.mark.parametrize("sampling", ["visits", "choice"])
@pytest.mark.parametrize("selection", ["threshold", "clusters"])
def test_unseen_blocks_are_kept_or_excluded_as_asked(sampling: str, selection: str) -> None:
    scores = skewed_scores(3000, unseen=1000)
    drawn = {}
    for unseen in ("keep", "exclude"):
        phase = Phase("focus", 1, drop=0.5, selection=selection, sampling=sampling, unseen=unseen)  # type: ignore[arg-type]
        order, report = make_order(phase, scores, 1000, 1, 1)
        assert report is not None
        assert report.unseen == 1000
        assert not report.left_out(scores)[order].any()
        drawn[unseen] = int(np.isnan(scores[order]).sum())
    assert drawn["exclude"] == 0
    assert 300 < drawn["keep"] < 700  # about half of what can be drawn is unseen


def test_an_order_depends_on_seed_and_phase_alone() -> None:
    scores = skewed_scores(500)
    phase = Phase("focus", 1, drop=0.5)
    first = make_order(phase, scores, 250, 1, 1)[0].tolist()
    assert first == make_order(phase, scores.copy(), 250, 1, 1)[0].tolist()
    assert first != make_order(phase, scores, 250, 2, 1)[0].tolist()
    assert first != make_order(phase, scores, 250, 1, 3)[0].tolist()


def test_focus_without_any_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no block has a score yet"):
        make_order(Phase("focus", 1, drop=0.5), np.full(4, np.nan, np.float32), 4, 1, 0)


def test_equal_scores_and_single_blocks_stay_drawable() -> None:
    for scores in (np.ones(10, np.float32), np.float32([3.0])):
        for selection in ("threshold", "clusters"):
            for sampling in ("passes", "visits", "choice"):
                phase = Phase("focus", 1, drop=0.9, selection=selection, sampling=sampling)  # type: ignore[arg-type]
                order, _ = make_order(phase, scores, 7, 1, 0)
                assert len(order) == 7
                assert set(order.tolist()) <= set(range(len(scores)))
