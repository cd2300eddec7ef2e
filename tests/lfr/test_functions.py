"""Scores by a function of the user's, against what it was given and what it returned."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr.lfr import Blend, Curriculum, CurriculumFollower, Journal, Phase, Plan, Schedule
from megatron_lfr.lfr.functions import Records, check_functions, digest_of, find_function

N, SEQ, BATCH = 40, 4, 8
NAME = "a_module_of_mine:score"

Function = Callable[[Records], Any]


def plan_of(name: str = NAME, **more: Any) -> Plan:
    focus = Phase("focus", 0.5, drop=0.5, score=f"call:{name}", **more)
    schedule = Schedule((Phase("learn", 0.8), focus, Phase("review", 0.5), focus))
    return schedule.plan(N, SEQ, BATCH, blend=Blend([0, 10, N]))


@pytest.fixture
def provide(monkeypatch: pytest.MonkeyPatch) -> Callable[[Function], None]:
    """Return what makes a function importable as NAME."""

    def set_function(function: Function) -> None:
        module = ModuleType("a_module_of_mine")
        module.score = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "a_module_of_mine", module)

    return set_function


def losses(step: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(step)
    return rng.gamma(4, 1, BATCH).astype(np.float32) * SEQ, np.full(BATCH, SEQ, np.float32)


def train(curriculum: Curriculum, until: int | None = None) -> list[int]:
    served: list[int] = []
    for step, ids in curriculum.steps():
        if step == until:
            break
        served += ids.tolist()
        curriculum.record(step, *losses(step))
    return served


def harder_later(records: Records) -> npt.NDArray[np.float64]:
    """By the age of the loss, and domain 1 before domain 0; the blocks never seen have no score."""
    scores = records.steps + 1000.0 * records.domains + records.visits / 100
    return np.where(np.isnan(records.losses), np.nan, scores)


def test_a_focus_ranks_by_what_the_function_returns(tmp_path: Path, provide: Callable[[Function], None]) -> None:
    given: list[Records] = []

    def score(records: Records) -> npt.NDArray[np.float64]:
        given.append(copy.deepcopy(records))  # they are views of what goes on
        with pytest.raises(ValueError, match="read-only"):
            records.losses[0] = 1
        return harder_later(records)

    provide(score)
    plan = plan_of()
    curriculum = Curriculum(plan, Journal(tmp_path, {}), seed=1)
    last: dict[int, tuple[float, int]] = {}
    for step, ids in curriculum.steps():
        start = curriculum.current
        assert start is not None
        if step == plan.phases[1].first_step:
            assert (given[0].starts, given[0].step) == ((0, 10, N), step)
            assert given[0].domains.tolist() == [0] * 10 + [1] * 30
            for block in range(N):
                loss, at = last.get(block, (np.nan, -1))
                assert given[0].losses[block] == pytest.approx(loss, nan_ok=True)
                assert (given[0].steps[block], given[0].visits[block]) == (at, at >= 0)
            np.testing.assert_array_equal(start.scores, harder_later(given[0]).astype(np.float32))
            seen = np.flatnonzero(~np.isnan(start.scores))
            easiest = seen[np.argsort(start.scores[seen], kind="stable")][: len(seen) // 2]
            assert not np.isin(curriculum.order, easiest).any()
        sums, counts = losses(step)
        curriculum.record(step, sums, counts)
        assert curriculum.ledger.nll.flags.writeable
        last |= {int(i): (float(s / c), step) for i, s, c in zip(ids, sums, counts, strict=True) if i >= 0}
    assert len(given) == 2
    kept = np.load(tmp_path / "phase_001.scores.npy")
    np.testing.assert_array_equal(kept, harder_later(given[0]).astype(np.float32))


def test_a_resume_reads_the_scores_and_does_not_call(tmp_path: Path, provide: Callable[[Function], None]) -> None:
    provide(harder_later)
    plan = plan_of()
    expected = train(Curriculum(plan, Journal(tmp_path / "complete", {}), seed=1))
    first = Curriculum(plan, Journal(tmp_path / "stopped", {}), seed=1)
    served = train(first, plan.phases[1].first_step + 1)
    state = first.state_dict()
    calls: list[int] = []

    def other_now(records: Records) -> npt.NDArray[np.float64]:
        calls.append(records.step)
        return harder_later(records)

    provide(other_now)
    second = Curriculum(plan, Journal(tmp_path / "stopped", {}), seed=1)
    second.load_state_dict(state)
    assert served + train(second) == expected
    assert calls == [plan.phases[3].first_step]


def test_leaders_compare_what_their_functions_made(tmp_path: Path, provide: Callable[[Function], None]) -> None:
    provide(harder_later)
    plan = plan_of()

    class OneProcess:
        """What two curricula of one process share, leader first."""

        def __init__(self) -> None:
            self.compared: list[tuple[str, int | None]] = []

        def share_order(self, phase: int, order: Any) -> Any:
            self.order = self.order if order is None else order
            return self.order

        def broadcast(self, value: int) -> int:
            return 1

        def compare(self, what: str, value: int | None) -> None:
            self.compared.append((what, value))

    sharing = OneProcess()
    leader = Curriculum(plan, Journal(tmp_path, {}), seed=1, sharing=sharing)
    follower = CurriculumFollower(plan, sharing)
    for (step, ids), (_, same) in zip(leader.steps(), follower.steps(), strict=True):
        assert ids.tolist() == same.tolist()
        leader.record(step, *losses(step))
        follower.record(step, *losses(step))
    digest = digest_of(np.load(tmp_path / "phase_001.scores.npy"))
    what = f"phase 1: score call:{NAME}"
    assert sharing.compared[:2] == [(what, digest), (what, None)]
    assert len(sharing.compared) == 4


def raises(records: Records) -> Any:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda records: records.losses[:-1], r"returned float32 \[39\], must be float32 or float64 \[40\]"),
        (lambda records: records.visits, r"returned uint16 \[40\], must be float32 or float64"),
        (lambda records: None, r"returned object \[\], must be"),
        (lambda records: np.full(N, 1e39), r"block 0 has the score 1e\+39: finite in float32"),
        (lambda records: np.where(np.arange(N) == 7, -np.inf, 1.0), "block 7 has the score -inf"),
        (lambda records: np.full(N, np.nan), "no block has a score"),
        (raises, r"KeyError: 'no such thing' \(.*test_functions.py, line \d+\)"),
    ],
)
def test_a_bad_result_names_phase_and_function(
    tmp_path: Path, provide: Callable[[Function], None], function: Function, message: str
) -> None:
    provide(function)
    with pytest.raises(ValueError, match=f"phase 1: score call:{NAME}: {message}"):
        train(Curriculum(plan_of(), Journal(tmp_path, {}), seed=1))


def test_a_function_must_be_there_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_here.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("no_such_module_here:f", "importing no_such_module_here fails: ModuleNotFoundError"),
        ("broken_here:f", "importing broken_here fails: ZeroDivisionError"),
        ("numpy:no_such_function", "numpy has no function no_such_function"),
        ("numpy:__version__", "numpy has no function __version__"),
    ):
        with pytest.raises(ValueError, match=f"phase 1: score call:{name}: {message}"):
            check_functions(plan_of(name))
        check_functions(plan_of(name), plan_of(name).phases[3].first_step + 1)  # begun: its scores are in the journal
        with pytest.raises(ValueError, match=message):
            Curriculum(plan_of(name), Journal(tmp_path / "journal", {}), seed=1).enter_phase()
    assert find_function("numpy:isnan") is np.isnan


@pytest.mark.parametrize(
    "score", ["call:", "call:f", "call:a.b", "call:a:b:c", "call:a..b:f", "call:1a:f", "call:a:b c"]
)
def test_what_is_no_function_is_refused(score: str) -> None:
    with pytest.raises(ValueError, match=r"choose from recorded, .*call:PACKAGE\.MODULE:FUNCTION"):
        Phase("focus", 1, score=score)


def test_passes_that_leave_out_what_has_no_score_have_no_length() -> None:
    with pytest.raises(ValueError, match="how many have one is not known before the run: 0 to 40 of 40"):
        plan_of(unit="passes", unseen="exclude")
    assert plan_of(unit="passes").phases[1].samples == 10  # half a pass of half of the blocks
