"""Both tails, weights among the kept, exploration, weights from outside and copies, as `make_order` makes them."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.lfr import Blend, Phase, Schedule, make_order
from megatron_lfr.lfr.identity import describe_phase, describe_segments, read_phase, read_plan
from megatron_lfr.lfr.weights import Counting, as_begun
from support.order_oracles import kept_by_threshold

Floats = npt.NDArray[np.float32]
N = 2000


def scores_of(n: int = N, seed: int = 0) -> Floats:
    scores = np.random.default_rng(seed).normal(3, 1, n).astype(np.float32)
    scores[::40] = np.nan
    return scores


@pytest.mark.parametrize("sampling", ["passes", "visits", "choice"])
@pytest.mark.parametrize("unseen", ["keep", "exclude"])
def test_a_focus_leaves_out_both_tails(sampling: str, unseen: str) -> None:
    scores = scores_of()
    phase = Phase("focus", 1, drop=0.3, drop_hardest=0.2, sampling=sampling, unseen=unseen)  # type: ignore[arg-type]
    kept = kept_by_threshold(scores, 0.3, unseen == "keep", 0.2)
    order, selection = make_order(phase, scores, 3 * N, 1, 1)
    assert set(order.tolist()) == set(kept)
    assert selection is not None
    assert np.flatnonzero(~selection.left_out(scores)).tolist() == kept
    assert (selection.dropped, selection.dropped_hardest) == (int(0.3 * 1950) + int(0.2 * 1950), int(0.2 * 1950))
    assert selection.easiest(scores).sum() == int(0.3 * 1950)


def test_complete_clusters_are_dropped_at_both_ends() -> None:
    scores = np.repeat([1.0, 2.0, 4.0, 7.0, 9.0], [10, 20, 40, 20, 10]).astype(np.float32)
    phase = Phase("focus", 1, drop=0.35, drop_hardest=0.15, selection="clusters", clusters=5, sampling="visits")
    order, selection = make_order(phase, scores, 600, 1, 1)
    assert selection is not None
    assert set(scores[order].tolist()) == {4.0, 7.0}
    assert (selection.dropped, selection.dropped_hardest) == (40, 10)
    assert set(scores[selection.left_out(scores)].tolist()) == {1.0, 2.0, 9.0}
    with_most = Phase("focus", 1, drop=0.5, drop_hardest=0.49, selection="clusters", clusters=2)
    assert len(set(make_order(with_most, np.array([1, 1, 5, 5], np.float32), 4, 1, 1)[0].tolist())) == 2


def test_capped_weights_are_linear_between_the_kept_quantiles() -> None:
    """The hardest kept blocks are visited three times as often as the easiest, whatever the scale of the score."""
    for scale in (1.0, 1e-3, -0.0):
        scores = (np.arange(1000, dtype=np.float32) + 5) * np.float32(scale or 1.0) - np.float32(scale == 0) * 900
        phase = Phase("focus", 1, drop=0.2, drop_hardest=0.2, sampling="visits")
        assert phase.weighting == "capped"
        visits = np.bincount(make_order(phase, scores, 600_000, 1, 1)[0], minlength=1000)
        kept = np.arange(200, 800)
        low, high = 200 + 0.05 * 600 - 1, 200 + 0.95 * 600 - 1  # the ranks of the quantiles
        expected = 1 + 2 * np.clip((kept - low) / (high - low), 0, 1)
        assert np.abs(visits[200:800] - 600_000 * expected / expected.sum()).max() < 1.5
        assert visits[:200].sum() == visits[800:].sum() == 0


def test_a_share_is_drawn_at_random_from_everything() -> None:
    scores = scores_of()
    phase = Phase("focus", 1, drop=0.5, explore=0.25)
    order, selection = make_order(phase, scores, 800, 1, 1)
    assert selection is not None
    plain, _ = make_order(Phase("focus", 1, drop=0.5), scores, 800, 1, 1)
    differs = order != plain
    assert 150 < differs.sum() <= 200
    left_out = selection.left_out(scores)
    explored = order[left_out[order] | differs]
    assert len(set(explored.tolist())) == len(explored)
    dropped = left_out[order].sum()
    assert abs(int(dropped) - 200 * 0.4875) < 5 * np.sqrt(200) / 2
    positions = np.flatnonzero(left_out[order])
    assert abs(positions.mean() - 400) < 5 * 800 / np.sqrt(12 * len(positions))  # spread over the phase


@pytest.mark.parametrize("kind", ["learn", "review"])
def test_learn_and_review_follow_a_weight(kind: str) -> None:
    weights = np.tile(np.array([0.0, 1.0, 2.0, 100.0], np.float32), 500)
    phase = Phase(kind, 1, weight="file:w", weight_cap=3)  # type: ignore[arg-type]
    visits = np.bincount(make_order(phase, scores_of(), 10_000, 1, 0, Counting(weights))[0], minlength=N)
    expected = np.minimum(weights, 3 * weights.mean()).astype(np.float64)
    assert np.abs(visits - 10_000 * expected / expected.sum()).max() < 1.001
    rooted = Phase(kind, 1, weight="file:w", weight_power=0.5, weight_cap=100)  # type: ignore[arg-type]
    visits = np.bincount(make_order(rooted, scores_of(), 10_000, 1, 0, Counting(weights))[0], minlength=N)
    assert np.abs(visits - 10_000 * np.sqrt(weights) / np.sqrt(weights).sum()).max() < 1.001


@pytest.mark.parametrize("sampling", ["passes", "visits", "choice"])
@pytest.mark.parametrize("selection", ["threshold", "clusters"])
def test_a_focus_follows_a_weight(sampling: str, selection: str) -> None:
    scores, weights = scores_of(), np.tile(np.array([0.0, 1.0, 2.0], np.float32), 700)[:N]
    phase = Phase(
        "focus",
        1,
        drop=0.5,
        sampling=sampling,
        selection=selection,
        weights="uniform",
        weight="file:w",
        unseen="keep",  # type: ignore[arg-type]
    )
    order, chosen = make_order(phase, scores, 300, 1, 1, Counting(weights))
    assert chosen is not None
    assert not chosen.left_out(scores)[order].any()
    kept = ~chosen.left_out(scores)
    sums = np.bincount(weights[kept].astype(int), weights[kept], minlength=3)
    shares = np.bincount(weights[order].astype(int), minlength=3) / 300
    assert shares[0] == 0
    if sampling != "choice":  # systematic: exact but for one in the cluster, and one for the unseen
        assert abs(shares[2] - sums[2] / sums.sum()) < 0.03
    unseen = np.isnan(scores[order]).mean()  # unseen blocks weigh as much as kept ones do on average
    assert abs(unseen - (weights * np.isnan(scores))[kept].sum() / weights[kept].sum()) < 0.05


def test_copies_count_once_each_in_turn() -> None:
    groups = np.arange(600, dtype=np.uint32)
    groups[300:] = np.repeat(np.arange(300, 400), 3)
    visits = np.zeros(600, np.int64)
    scores = np.full(600, np.nan, np.float32)
    order, _ = make_order(Phase("learn", 1, copies="once"), scores, 1200, 1, 0, Counting(None, groups))
    for number in range(3):  # three passes over 400 groups
        part = order[400 * number : 400 * number + 400]
        assert sorted(groups[part].tolist()) == list(range(400))
    visits = np.bincount(order, minlength=600)
    assert visits.tolist() == [3] * 300 + [1] * 300
    later, _ = make_order(Phase("review", 1, copies="once"), scores, 400, 1, 2, Counting(None, groups, (400,)))
    assert sorted(later.tolist()) == sorted(order[400:800].tolist())  # the second turn
    logarithmic, _ = make_order(Phase("learn", 1, copies="log"), scores, 500, 1, 0, Counting(None, groups))
    assert Counter(Counter(groups[logarithmic].tolist()).values()) == {1: 300, 2: 100}
    weights = np.where(np.arange(600) < 200, 0, 1).astype(np.float32)
    weighted = Phase("learn", 1, copies="once", weight="file:w")
    both, _ = make_order(weighted, scores, 400, 1, 0, Counting(weights, groups))
    assert sorted(groups[both[:200]].tolist()) == sorted(groups[both[200:]].tolist()) == list(range(200, 400))


def test_copies_in_turn_count_by_their_weights() -> None:
    groups = np.repeat(np.arange(200, dtype=np.uint32), 2)
    weights = np.tile(np.array([1, 1, 0.5, 0.5], np.float32), 100)
    phase = Phase("learn", 1, copies="once", weight="file:w")
    order, _ = make_order(phase, np.full(400, np.nan, np.float32), 6000, 1, 0, Counting(weights, groups))
    assert (weights[order] == 1).mean() == pytest.approx(2 / 3, abs=0.01)
    turns = order.reshape(30, 200)
    for turn, after in itertools.pairwise(turns):  # of each group one copy has its turn, then the other
        assert len(set(turn)) == len(set(groups[turn]))
        assert not set(turn) & set(after)


def test_corpora_with_weights_count_each_by_itself() -> None:
    groups = np.array([0, 0, 0, 0, 1, 2, 3, 3, 3, 3], np.uint32)
    counting = Counting(np.array([1, 1, 1, 1, 1, 1, 0, 0, 2, 2], np.float32), groups)
    phase = Phase("learn", 1, weight="file:w")
    order, _ = Blend([0, 6, 10], [1, 1]).make_order(phase, np.zeros(10, np.float32), 24, 1, 0, counting)
    assert np.bincount(order, minlength=10).tolist() == [2] * 6 + [0, 0, 6, 6]
    once = Phase("learn", 1, copies="once")
    order, _ = Blend([0, 6, 10], [1, 1]).make_order(once, np.zeros(10, np.float32), 24, 1, 0, Counting(None, groups))
    assert np.bincount(order, minlength=10).tolist() == [1] * 4 + [4, 4] + [3] * 4


LEGAL = {
    "drop": 0.2,
    "drop_hardest": 0.1,
    "sampling": "choice",
    "weights": "uniform",
    "explore": 0.1,
    "weight": "file:w",
    "weight_power": 0.5,
    "weight_cap": 2.0,
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"drop": 0.6, "drop_hardest": 0.4}, "phase drop_hardest 0.4: must be at least 0, and below 1 together"),
        ({"drop_hardest": -0.1}, "phase drop_hardest -0.1"),
        ({"drop_hardest": float("nan")}, "phase drop_hardest nan"),
        ({"explore": 1.0}, "phase explore 1.0: must be at least 0 and below 1"),
        ({"explore": "some"}, "phase explore 'some': must be a number"),
        ({"weights": "exp"}, "phase weights 'exp': choose from auto, uniform, capped, perplexity"),
        ({"weights": "capped", "sampling": "passes"}, "phase weights capped: a pass visits every kept block once"),
        ({"weight": "ref"}, "phase weight 'ref': choose from none, file:NAME"),
        ({"weight": "excess:ref"}, "phase weight 'excess:ref'"),
        ({"weight_power": 0}, "phase weight_power 0: must be above 0, and at most 16"),
        ({"weight_cap": 0.5}, "phase weight_cap 0.5: must be at least 1 and finite"),
        ({"copies": "twice"}, "phase copies 'twice': choose from once, log, all"),
        ({"copies": "once"}, "phase copies once: only a learn or review phase counts copies"),
        ({"unit": "passes"}, "phase unit passes: a pass has no fixed length with weight or copies"),
        ({"kind": "learn", "drop": 0.0, "explore": 0.0}, "phase drop_hardest 0.1: only a focus phase has it"),
        ({"kind": "review", "drop": 0.0, "drop_hardest": 0.0}, "phase explore 0.1: only a focus phase has it"),
    ],
)
def test_what_does_not_go_together_is_refused(row: dict[str, object], message: str) -> None:
    rows = [{"kind": "learn", "duration": 1}, {"kind": "focus", "duration": 1, **LEGAL}]
    assert Schedule.from_dicts(rows).phases[1].weighted_by == "w"
    with pytest.raises(ValueError, match=f"phase 1: {message}".replace("(", "\\(")):
        Schedule.from_dicts([rows[0], {**rows[1], **row}])


def test_what_a_run_remembers_means_the_same_and_stays_as_it_was() -> None:
    first = {"kind": "focus", "duration": 1, "unit": "epochs", "drop": 0.5, "selection": "threshold",
             "sampling": "choice", "score": "detrended", "unseen": "auto", "clusters": 8}  # fmt: skip
    assert Phase(**read_phase(first)).weighting == "perplexity"  # exp(loss) was all there was
    assert describe_phase(Phase(**read_phase(first))) == first
    new = Phase(**first)  # type: ignore[arg-type]
    assert describe_phase(new) == {**first, "weights": "capped"}
    assert as_begun([new], [Phase(**read_phase(first))])[0].weighting == "perplexity"
    assert as_begun([new], [Phase(**read_phase(describe_phase(new)))])[0].weighting == "capped"
    assert as_begun([new], [])[0].weighting == "capped"


def test_a_run_of_a_preset_of_before_goes_on_so() -> None:
    now = Phase("focus", 0.1, "share", least_scored=0.8, guard="file:weight", passes="continued")
    then = replace(now, least_scored=0.0, guard="none", passes="anew")
    assert as_begun([now], [then], of_preset=True) == (then,)
    assert as_begun([now], [now], of_preset=True) == as_begun([now], [], of_preset=True) == (now,)
    assert as_begun([now], [then]) == (now,)  # a schedule file says what it says: such a run is refused
    capped = replace(now, sampling="choice", weights="capped")
    by_loss = replace(capped, weights="perplexity")
    assert as_begun([capped], [by_loss], of_preset=True) == (by_loss,)
    assert as_begun([capped], [capped], of_preset=True) == (capped,)
    assert as_begun([capped], [by_loss]) == (capped,)


def test_what_blocks_count_by_is_said() -> None:
    assert Phase("learn", 1, weight="file:w", copies="log").counting == "blocks count by file:w, copies count log"
    assert Phase("focus", 1, drop=0.5).counting == ""
    changed = Phase("learn", 1, weight="file:w", weight_power=2, weight_cap=8)
    assert changed.counting == "blocks count by file:w to the power of 2 (at most 8 times the mean)"


@given(st.data())
def test_plans_are_read_as_they_were_written(data: st.DataObject) -> None:
    more = {name: value for name, value in LEGAL.items() if data.draw(st.booleans(), label=name)}
    if more.get("sampling") != "choice":
        more.pop("weights", None)
    copies = data.draw(st.sampled_from(["once", "log", "all"]))
    rows = [{"kind": "learn", "duration": 1, "copies": copies}, {"kind": "focus", "duration": 1, **more}]
    plan = Schedule.from_dicts(rows).plan(100, 8, 10)
    digests = [{"w": "1", "copies": "2"}]
    facts = describe_segments(plan, digests)
    read, _ = read_plan({"format": 2, "seed": 1, "seq_length": 8, "segments": facts})
    assert describe_segments(read, digests) == facts
    for one, other in zip(plan.phases, read.phases, strict=True):
        assert (one.phase.weighting, one.phase.drop_hardest, one.phase.explore, one.phase.weight, one.phase.copies) == (
            other.phase.weighting,
            other.phase.drop_hardest,
            other.phase.explore,
            other.phase.weight,
            other.phase.copies,
        )
