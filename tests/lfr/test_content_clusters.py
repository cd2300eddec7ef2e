"""Focus on clusters of content, against brute force over clusters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.lfr import Blend, Phase, Schedule, make_order
from megatron_lfr.lfr.identity import describe_phase, describe_segments, read_plan
from megatron_lfr.lfr.scores import check_arrays, used_arrays
from megatron_lfr.lfr.weights import Counting

Clusters = npt.NDArray[np.uint32]
Scores = npt.NDArray[np.float32]


def focus(**more: Any) -> Phase:
    return Phase("focus", 1, selection="clusters", cluster_by="file:topics", **more)


def dropped_by_hand(scores: Scores, clusters: Clusters, drop: float, drop_hardest: float) -> tuple[set[int], set[int]]:
    """Return the clusters that are dropped as easy and as hard."""
    seen = [(c, scores[(clusters == c) & ~np.isnan(scores)]) for c in range(clusters.max() + 1)]
    ranked = sorted((float(np.sum(s, dtype=np.float64)) / len(s), c, len(s)) for c, s in seen if len(s))
    total = sum(size for _, _, size in ranked)

    def take(rows: list[tuple[float, int, int]], share: float, left: int) -> set[int]:
        chosen: set[int] = set()
        size = 0
        for _, cluster, count in rows[:left]:
            size += count
            if size > share * total + 1e-6:
                break
            chosen.add(cluster)
        return chosen

    easy = take(ranked, drop, len(ranked) - 1)
    return easy, take(ranked[::-1], drop_hardest, len(ranked) - len(easy) - 1)


@given(
    seed=st.integers(0, 1000),
    n=st.integers(3, 120),
    k=st.integers(1, 12),
    drops=st.sampled_from([(0.0, 0.0), (0.5, 0.0), (0.3, 0.3), (0.0, 0.9), (0.99, 0.0)]),
    sampling=st.sampled_from(["passes", "visits", "choice"]),
    weights=st.sampled_from(["auto", "uniform"]),
    unseen=st.sampled_from(["keep", "exclude"]),
    scale=st.sampled_from([0.0, 1.0]),
)
def test_complete_clusters_are_dropped_by_their_mean(
    seed: int, n: int, k: int, drops: tuple[float, float], sampling: Any, weights: Any, unseen: Any, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(3, 1, n) * scale, 2).astype(np.float32)
    scores[rng.random(n) < 0.2] = np.nan
    scores[0] = 3
    clusters = rng.integers(0, k, n).astype(np.uint32)
    phase = focus(drop=drops[0], drop_hardest=drops[1], sampling=sampling, weights=weights, unseen=unseen)
    order, selection = make_order(phase, scores, 4 * n, 1, 1, Counting(clusters=clusters))
    easy, hard = dropped_by_hand(scores, clusters, *drops)
    seen = ~np.isnan(scores)
    left_out = np.where(seen, np.isin(clusters, [*easy, *hard]), unseen == "exclude")
    assert selection is not None
    assert selection.left_out(scores).tolist() == left_out.tolist()
    assert selection.easiest(scores).tolist() == (seen & np.isin(clusters, [*easy])).tolist()
    assert selection.dropped == (left_out & seen).sum()
    assert selection.dropped_hardest == (seen & np.isin(clusters, [*hard])).sum()
    assert (selection.unseen, selection.n_blocks) == ((~seen).sum(), n)
    assert len(order) == 4 * n
    assert set(order.tolist()) == set(np.flatnonzero(~left_out).tolist())


def test_each_cluster_gets_its_share_of_the_visits() -> None:
    """Rounded up or down, although its blocks lie scattered; by chance, the counts would spread by ten."""
    rng, n = np.random.default_rng(0), 6000
    scores, clusters = rng.normal(3, 1, n).astype(np.float32), rng.integers(0, 30, n).astype(np.uint32)
    for weights in ("uniform", "perplexity"):
        phase = focus(drop=0.3, sampling="visits", weights=weights)
        order, selection = make_order(phase, scores, n // 2, 1, 1, Counting(clusters=clusters))
        assert selection is not None
        kept = np.flatnonzero(~selection.left_out(scores))
        weight = np.exp(np.minimum(scores, np.sort(scores)[-7])) if weights == "perplexity" else np.ones(n)
        expected = np.bincount(clusters[kept], weight[kept]) / weight[kept].sum() * len(order)
        counts = np.bincount(clusters[order], minlength=len(expected))
        assert np.abs(counts - expected).max() < 1.01
        blocks = np.bincount(order, minlength=n)[kept]
        assert np.abs(blocks - len(order) * weight[kept] / weight[kept].sum()).max() < 1.01


def test_weights_from_outside_count_within_clusters() -> None:
    n = 400
    scores, clusters = np.repeat([1.0, 2.0], n // 2).astype(np.float32), (np.arange(n) % 4).astype(np.uint32)
    scores += (clusters * 0.1).astype(np.float32)
    factors = np.where(np.arange(n) % 8 < 4, 1.0, 0.25).astype(np.float32)
    phase = focus(drop=0.25, sampling="passes", weight="file:w")
    order, _ = make_order(phase, scores, 1000, 1, 1, Counting(weights=factors, clusters=clusters))
    visits = np.bincount(order, minlength=n)
    kept = clusters > 0
    assert visits[~kept].sum() == 0
    assert np.abs(visits[kept] - 1000 * factors[kept] / factors[kept].sum()).max() < 1.01


def test_corpora_are_clustered_apart_where_they_are_ranked_apart() -> None:
    scores = np.array([1, 2, 3, 4, 40, 30, 20, 10], np.float32)
    arrays = {"topics": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.uint32)}
    schedule = Schedule((Phase("learn", 1), focus(drop=0.5)))
    for scope, kept in (("per-corpus", {2, 3, 4, 5}), ("global", {4, 5, 0, 1})):
        blend = Blend([0, 4, 8], focus_scope=scope)  # type: ignore[arg-type]
        plan = schedule.plan(8, 4, 2, blend=blend)
        check_arrays(plan, [arrays])
        order, selection = plan.make_order(plan.phases[1], scores, 1, arrays)
        assert set(order.tolist()) == kept
        assert selection is not None
        assert set(np.flatnonzero(~selection.left_out(scores)).tolist()) == kept
        assert selection.easiest(scores).sum() == 4
    scoped = Schedule((Phase("learn", 1), focus(drop=0.5, scope=("b",)))).plan(
        8, 4, 2, blend=Blend([0, 4, 8]), names=["a", "b"]
    )
    order, selection = scoped.make_order(scoped.phases[1], scores, 1, arrays)
    assert set(order.tolist()) == {4, 5}
    assert selection is not None
    assert np.flatnonzero(~selection.left_out(scores)).tolist() == [4, 5]


def test_a_phase_says_which_array_it_needs() -> None:
    phase = focus(drop=0.5)
    assert used_arrays([phase, Phase("learn", 1, cluster_by="file:other")]) == ["topics"]
    assert used_arrays([Phase("focus", 1, cluster_by="file:topics")]) == []  # a threshold has no clusters
    assert describe_phase(phase)["cluster_by"] == "file:topics"
    assert "cluster_by" not in describe_phase(Phase("focus", 1, selection="clusters"))
    plan = Schedule((Phase("learn", 1), phase)).plan(9, 4, 2)
    facts = {"format": 2, "seed": 1, "seq_length": 4, "segments": describe_segments(plan, [{"topics": "abc"}])}
    assert read_plan(facts)[0] == plan
    assert facts["segments"][0]["arrays"] == {"topics": "abc"}  # type: ignore[index]
    for array, message in (
        (np.zeros(8, np.uint32), r"has the shape \[8\], but there are 9 blocks"),
        (np.zeros(9, np.float32), "is of type float32, must be uint32"),
        (np.full(9, 9, np.uint32), "block 0 has 9, must be below the number of blocks, 9"),
    ):
        with pytest.raises(ValueError, match=f"phase 1: array topics: {message}"):
            check_arrays(plan, [{"topics": array}])
    with pytest.raises(ValueError, match="phase 1: there is no array 'topics'"):
        check_arrays(plan, [{}])
    for illegal in ("topics", "file:", "excess:topics", 3):
        with pytest.raises(ValueError, match="choose from score, file:NAME"):
            Phase("focus", 1, selection="clusters", cluster_by=illegal)  # type: ignore[arg-type]


def test_the_order_depends_on_nothing_else() -> None:
    rng, n = np.random.default_rng(5), 3000
    scores, clusters = rng.normal(3, 1, n).astype(np.float32), rng.integers(0, 9, n).astype(np.uint32)
    for sampling in ("passes", "visits", "choice"):
        phase = focus(drop=0.4, drop_hardest=0.1, sampling=sampling)
        orders = [make_order(phase, scores, n, seed, 1, Counting(clusters=clusters))[0].tolist() for seed in (1, 1, 2)]
        assert orders[0] == orders[1] != orders[2]
        assert Counter(clusters[orders[0]].tolist()).keys() == Counter(clusters[orders[2]].tolist()).keys()
