"""The numbers that the page shows, against counting one visit after another."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.analysis import overview
from megatron_lfr.analysis.forgetting import CLASSES, Trajectories
from megatron_lfr.analysis.overview import BIN, RunView, quantile, view_run
from megatron_lfr.analysis.replay import PhaseHistory, open_run
from megatron_lfr.lfr import UNRECORDED


@pytest.fixture(scope="module")
def view(made_run: Path) -> RunView:
    return view_run(made_run, "made", margin=0.1)


@pytest.fixture(scope="module")
def histories(made_run: Path) -> list[PhaseHistory]:
    return list(open_run(made_run).phases())


def domain_index(view: RunView, block: int) -> int:
    return max(i for i, start in enumerate(view.corpus.starts[:-1]) if block >= start)


def test_the_run_is_worth_looking_at(view: RunView) -> None:
    assert view.corpus.domains == ["web", "code", "books", "lists"]
    assert [phase.name for phase in view.phases] == ["0 learn", "1 focus", "2 review", "3 focus", "4 review"]
    assert view.classes.sum(axis=0)[5:].all()  # forgotten, relearned once, several times


def test_visits_and_losses_of_each_phase(view: RunView, histories: list[PhaseHistory]) -> None:
    last: dict[int, float] = {}
    for phase, history in zip(view.phases, histories, strict=True):
        ids = history.block_ids.tolist()
        visits = Counter(domain_index(view, block) for block in ids)
        assert phase.visits_by_domain.tolist() == [visits[i] for i in range(4)]
        assert phase.distinct == len(set(ids))
        assert phase.mean_loss == pytest.approx(float(history.nll.mean(dtype=np.float64)))
        by_step = defaultdict(list)
        for number, loss in enumerate(history.nll.tolist()):
            by_step[number // 128].append(loss)
        assert phase.step_losses == pytest.approx([np.mean(losses) for _, losses in sorted(by_step.items())])
        last.update(zip(ids, history.nll.tolist(), strict=True))
        assert phase.losses is not None
        assert phase.losses.sum(axis=1).tolist() == np.bincount([domain_index(view, b) for b in last]).tolist()
        for share in (0.05, 0.5, 0.95):
            exact = float(np.quantile(list(last.values()), share))
            assert quantile(phase.losses.sum(axis=0), share) == pytest.approx(exact, abs=1.5 * BIN)


def test_what_a_focus_left_out(view: RunView, histories: list[PhaseHistory]) -> None:
    for phase, history in zip(view.phases, histories, strict=True):
        if history.selection is None:
            assert phase.focus is None
            continue
        assert phase.focus is not None
        # by hand: the easiest share of the scores, lowest first
        scores = history.scores
        easiest = np.argsort(scores, kind="stable")[: history.selection.dropped]
        assert phase.focus.dropped.size == len(easiest) == int(history.planned.phase.drop * len(scores))
        marked = np.unpackbits(phase.focus.dropped.bits)[: len(scores)]
        assert set(np.flatnonzero(marked)) == set(easiest.tolist())
        counts = np.bincount([domain_index(view, block) for block in easiest.tolist()], minlength=4)
        assert phase.focus.dropped_by_domain.tolist() == counts.tolist()
        assert not set(easiest.tolist()) & set(history.block_ids.tolist())


def test_classes_and_single_blocks(view: RunView, histories: list[PhaseHistory]) -> None:
    visits: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for history in histories:
        for block, step, loss in zip(
            history.block_ids.tolist(), history.steps.tolist(), history.nll.tolist(), strict=True
        ):
            visits[block].append((step + 1, loss))
    trajectories = Trajectories(view.run.plan.n_blocks, 0.1)
    one_by_one = [(block, loss) for block, seen in visits.items() for _, loss in seen]
    trajectories.record(np.array([b for b, _ in one_by_one]), np.array([x for _, x in one_by_one], np.float32))
    expected = np.zeros((4, len(CLASSES)), np.int64)
    for block, kind in enumerate(trajectories.classes().tolist()):
        expected[domain_index(view, block), kind] += 1
    assert view.classes.tolist() == expected.tolist()
    picks = view.picks
    for block in [*picks.hardest, *picks.easiest, *picks.most_forgotten]:
        assert list(zip(block.steps.tolist(), block.nll.tolist(), strict=True)) == visits[block.id]
    most = sorted(trajectories.forgotten().tolist(), reverse=True)[:6]
    assert [block.forgotten for block in picks.most_forgotten] == most
    scores = view.run.ledger().detrended_scores()
    assert [block.id for block in picks.hardest] == np.argsort(-scores, kind="stable")[:6].tolist()
    assert [block.id for block in picks.easiest] == np.argsort(scores, kind="stable")[:6].tolist()


def test_the_margin_moves_what_counts_as_forgotten(view: RunView) -> None:
    forgotten = [share for _, share, _ in view.sensitivity]
    assert forgotten == sorted(forgotten, reverse=True)
    assert forgotten[0] > forgotten[-1]
    twice = view.classes[:, 1:].sum()
    at_margin = {margin: (a, b) for margin, a, b in view.sensitivity}[view.margin]
    assert at_margin == pytest.approx((view.classes[:, 5:].sum() / twice, view.classes[:, 6:].sum() / twice))


def test_tokens_at_each_step(view: RunView, histories: list[PhaseHistory]) -> None:
    tokens = 0
    for history in histories:
        for first in range(0, len(history.nll), 128):
            step = history.planned.first_step + first // 128
            assert view.tokens_at(step) == tokens
            tokens += len(history.nll[first : first + 128]) * view.seq_length
    assert view.tokens_at(view.run.plan.total_steps) == tokens == view.tokens_at(10**9)


def test_a_skipped_step_is_no_visit(run_folder: Path) -> None:
    path = run_folder / "journal" / "phase_004.npy"
    losses = np.load(path)
    losses[128:256] = UNRECORDED
    path.write_bytes(path.read_bytes()[:128] + losses.tobytes())
    view = view_run(run_folder, "mine", margin=0.1)
    assert np.isnan(view.phases[4].step_losses).tolist() == [i == 1 for i in range(len(view.phases[4].step_losses))]
    assert view.phases[4].visits_by_event.sum() == len(losses) - 128


def test_a_skipped_step_is_no_visit_of_a_single_block(run_folder: Path) -> None:
    path = run_folder / "journal" / "phase_004.npy"
    losses = np.load(path)
    losses[128:] = UNRECORDED  # all but the first step
    path.write_bytes(path.read_bytes()[:128] + losses.tobytes())
    view = view_run(run_folder, "mine", margin=0.1)
    picked = [*view.picks.hardest, *view.picks.easiest, *view.picks.most_forgotten]
    skipped = view.run.visits([block.id for block in picked])
    assert np.isnan(skipped["nll"]).any()
    assert all(np.isfinite(block.nll).all() for block in picked)


def test_unseen_blocks_are_not_dropped_ones(hurried_runs: list[Path]) -> None:
    for run, excludes in zip(hurried_runs, (False, True), strict=True):
        view = view_run(run, "hurried", margin=0.1)
        learn, focus = list(open_run(run).phases())[:2]
        seen = set(learn.block_ids.tolist())
        focused = view.phases[1].focus
        assert focused is not None
        unseen = [block for block in range(view.run.plan.n_blocks) if block not in seen]
        counts = Counter(domain_index(view, block) for block in unseen)
        assert focused.unseen_by_domain.tolist() == [counts[i] for i in range(4)]
        assert focused.excluded_by_domain.tolist() == [counts[i] if excludes else 0 for i in range(4)]
        dropped = set(np.flatnonzero(np.unpackbits(focused.dropped.bits)).tolist())
        assert dropped < seen
        assert len(dropped) == focused.dropped.size == int(0.4 * len(seen))
        assert bool(set(focus.block_ids.tolist()) & set(unseen)) != excludes
        assert view.unseen == view.run.plan.n_blocks - len(
            {b for h in open_run(run).phases() for b in h.block_ids.tolist()}
        )


def test_the_sample_is_of_evenly_spaced_blocks(made_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "_SENSITIVITY_BLOCKS", 600)
    view = view_run(made_run, "made", margin=0.2)
    stride = -(-view.run.plan.n_blocks // 600)
    assert stride > 1
    trajectories = Trajectories(view.run.plan.n_blocks, 0.2)
    for history in view.run.phases():
        trajectories.record(history.block_ids, history.nll)
    counts = np.bincount(trajectories.classes()[::stride], minlength=len(CLASSES))
    shares_forgotten = {margin: shares for margin, *shares in view.sensitivity}[0.2]
    assert shares_forgotten == pytest.approx([counts[5:].sum() / counts[1:].sum(), counts[6:].sum() / counts[1:].sum()])
