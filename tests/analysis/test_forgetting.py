"""Learned, forgotten, relearned: against a search through each block's entire history."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.analysis.forgetting import CLASSES, EVENTS, Trajectories
from megatron_lfr.lfr import UNRECORDED


def changes_of(losses: list[float], margin: float) -> dict[int, str]:
    """Where a history falls or rises: the first visit that is more than `margin` below some visit since the last change
    (a fall, unless the last change was one), or above some (a rise)."""
    changes: dict[int, str] = {}
    since, last = 0, ""
    for j in range(len(losses)):
        before = losses[since : j + 1]
        if last != "fall" and any(loss - losses[j] > margin for loss in before):
            changes[j], since, last = "fall", j, "fall"
        elif last != "rise" and any(losses[j] - loss > margin for loss in before):
            changes[j], since, last = "rise", j, "rise"
    return changes


def class_of(losses: list[float], margin: float) -> str:
    """Return the class of a history by the words of the documentation, applied to its falls and rises."""
    kinds = "".join(kind[0] for kind in changes_of(losses, margin).values())
    if len(losses) < 2:
        return "seen less than twice"
    after_fall = kinds[kinds.find("f") :] if "f" in kinds else ""
    if not kinds:
        return "steady"
    if "r" not in kinds:
        return "learned"
    if "f" not in kinds:
        return "unlearned"
    if "r" not in after_fall:
        return "rose, then learned"
    return {0: "forgotten", 1: "forgotten, relearned once"}.get(
        after_fall.count("rf"), "forgotten, relearned several times"
    )


def events_of(losses: list[float], margin: float) -> Counter[str]:
    events = Counter({"first visit": 1} if losses else {})
    fallen = False
    at = changes_of(losses, margin)
    for j in range(1, len(losses)):
        kind = at.get(j)
        name = {"fall": "relearned" if fallen else "learned", "rise": "forgotten" if fallen else "rose"}.get(str(kind))
        events[name or "no change"] += 1
        fallen = fallen or kind == "fall"
    return events


VISITS = st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 12)), max_size=60)


@given(visits=VISITS, margin=st.sampled_from([0.0, 0.25, 1.0]), calls=st.integers(1, 4))
def test_against_entire_histories(visits: list[tuple[int, int]], margin: float, calls: int) -> None:
    n_blocks = 6  # the last one is never visited
    ids = np.array([block for block, _ in visits], np.uint32)
    nll = np.array([UNRECORDED if level < 0 else level / 4 for _, level in visits], np.float32)
    trajectories = Trajectories(n_blocks, margin)
    counts = np.zeros(len(EVENTS), np.int64)
    for part in np.array_split(np.arange(len(ids)), calls):
        counts += trajectories.record(ids[part], nll[part])
    histories = [[level / 4 for block, level in visits if block == i and level >= 0] for i in range(n_blocks)]
    assert [CLASSES[c] for c in trajectories.classes()] == [class_of(one, margin) for one in histories]
    kinds = ["".join(kind[0] for kind in changes_of(one, margin).values()) for one in histories]
    assert trajectories.forgotten().tolist() == [one.count("fr") for one in kinds]
    assert trajectories.relearned().tolist() == [one.lstrip("r").count("rf") for one in kinds]
    expected = sum((events_of(one, margin) for one in histories), Counter())
    assert dict(zip(EVENTS, counts.tolist(), strict=True)) == {name: expected[name] for name in EVENTS}
    setbacks = [max([0.0, *(one[j] - min(one[:j]) for j in range(1, len(one)))]) for one in histories]
    assert trajectories.setback.tolist() == setbacks


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0], "seen less than twice"),
        ([3.0, 2.95, 3.04], "steady"),
        ([3.0, 2.95, 2.88], "learned"),  # two small steps make one fall
        ([3.0, 2.0, 2.05, 1.5], "learned"),  # a rise within the margin is none
        ([3.0, 3.2], "unlearned"),
        ([3.0, 3.2, 2.0], "rose, then learned"),
        ([3.0, 2.0, 2.5], "forgotten"),
        ([3.0, 2.0, 2.5, 2.0], "forgotten, relearned once"),
        ([3.0, 2.0, 2.5, 2.0, 2.5, 2.0], "forgotten, relearned several times"),
    ],
)
def test_each_class(losses: list[float], expected: str) -> None:
    trajectories = Trajectories(1, margin=0.1)
    trajectories.record(np.zeros(len(losses), np.uint32), np.array(losses, np.float32))
    assert CLASSES[trajectories.classes()[0]] == expected


def test_counts_stop_at_255() -> None:
    trajectories = Trajectories(1, margin=0.5)
    trajectories.record(np.zeros(1000, np.uint32), np.tile(np.array([2, 1], np.float32), 500))
    assert trajectories.forgotten().tolist() == [255]
    assert CLASSES[trajectories.classes()[0]] == "forgotten, relearned several times"


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_a_bad_margin_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        Trajectories(3, margin)
