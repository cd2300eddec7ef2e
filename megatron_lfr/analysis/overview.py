"""One run as `megatron-lfr report` shows it, gathered while its journal is replayed once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.forgetting import CLASSES, Trajectories
from megatron_lfr.analysis.replay import PhaseHistory, Run, open_run
from megatron_lfr.analysis.similarity import BlockSet
from megatron_lfr.analysis.single_blocks import Picks, pick_blocks
from megatron_lfr.lfr import Ledger, PlannedPhase
from megatron_lfr.lfr.blend import BlendSelection
from megatron_lfr.lfr.guard import Verdict, kind_of
from megatron_lfr.lfr.scope import ScopedSelection
from megatron_lfr.run_folder import Corpus, find_corpus

Counts = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

BIN = 0.02
"""Width of a bin of the loss histograms, nats."""
_BINS = 1000
"""Bins of a histogram, of which the last also counts everything above."""

SENSITIVITY_MARGINS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
_SENSITIVITY_BLOCKS = 200_000
_NO_SCORES = np.empty(0, np.float32)


@dataclass(frozen=True)
class FocusView:
    """What a Focus left out. Counts [domains] are numbers of blocks, of those that the phase is about: sizes says how
    many these are; hardest ones are those dropped that are above the kept ones, excluded blocks are unseen and left
    out."""

    sizes: Counts
    dropped: BlockSet
    dropped_by_domain: Counts
    hardest_by_domain: Counts
    unseen_by_domain: Counts
    excluded_by_domain: Counts


@dataclass
class PhaseView:
    """One phase, as far as it has come.

    samples_so_far: visits of blocks. distinct: different blocks among them. mean_loss: nats a token, NaN where none is
    recorded. visits_by_domain [domains]: how many of the visits were of each domain. visits_by_event: how many were of
    each kind of forgetting.EVENTS.
    step_losses [steps so far]: mean loss of each step, NaN where it was skipped.
    losses [domains, bins of BIN nats]: how many blocks have their last recorded loss in each bin at the end of the
    phase; None before that.
    """

    planned: PlannedPhase
    samples_so_far: int
    distinct: int
    mean_loss: float
    visits_by_domain: Counts
    visits_by_event: Counts
    step_losses: Doubles
    focus: FocusView | None
    verdict: Verdict | None
    losses: Counts | None = None

    @property
    def kind(self) -> str:
        """What the phase trained as."""
        return kind_of(self.planned.phase, self.verdict)

    @property
    def name(self) -> str:
        return f"{self.planned.index} {self.kind}"


@dataclass
class RunView:
    """One run.

    visits [domains]: how often blocks of each domain were trained on. unseen: number of blocks that never were.
    classes [domains, len(forgetting.CLASSES)]: how many blocks are of each class. sensitivity: (margin, share that was
    forgotten, share that was forgotten and relearned) of the blocks seen at least twice, from a sample of the blocks.
    """

    name: str
    run: Run
    events: list[dict[str, Any]]
    corpus: Corpus
    phases: list[PhaseView]
    visits: Counts
    unseen: int
    classes: Counts
    margin: float
    sensitivity: list[tuple[float, float, float]]
    picks: Picks

    @property
    def seq_length(self) -> int:
        return self.run.plan.seq_length

    def tokens_at(self, step: int) -> int:
        """Return how many tokens the first `step` optimizer steps train on."""
        return self.run.plan.samples_before(step) * self.run.plan.seq_length

    def event_rows(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind in metrics.jsonl. ValueError where one has no valid step."""
        rows = [event for event in self.events if event.get("event") == kind]
        for row in rows:
            if type(row.get("step")) is not int or row["step"] < 0:
                raise ValueError(f"{self.run.folder.metrics_file}: an event at step {row.get('step')!r}")
        return rows


def view_run(folder: Path, name: str, margin: float) -> RunView:
    """Replay a run and gather what the report shows. ValueError where `folder` holds no run, or a damaged one."""
    run = open_run(folder)
    corpus = find_corpus(run.folder)
    n_blocks = run.plan.n_blocks
    ledger = run.empty_ledger()
    trajectories = Trajectories(n_blocks, margin)
    sample = _Sample(n_blocks)
    views: list[PhaseView] = []
    visits = np.zeros(len(corpus.domains), np.int64)
    replayed: list[PhaseHistory] = []
    for history in run.phases(ledger):
        visits = _finish_phase(views, ledger, corpus, visits)
        sample.record(history)
        views.append(_view_phase(history, run, trajectories, corpus))
        replayed.append(replace(history, scores=_NO_SCORES, selection=None))  # they are large
    visits = _finish_phase(views, ledger, corpus, visits)
    classes = trajectories.classes()
    by_domain = [np.bincount(part, minlength=len(CLASSES)) for part in split(classes, corpus)]
    picks = pick_blocks(replayed, ledger, trajectories)
    unseen, events = int(np.count_nonzero(ledger.visits == 0)), run.folder.events()
    return RunView(
        name, run, events, corpus, views, visits, unseen, np.array(by_domain), margin, sample.shares(), picks
    )


def split(values: npt.NDArray[Any], corpus: Corpus) -> list[npt.NDArray[Any]]:
    """Split per-block values [n_blocks] by domain."""
    return [values[first:last] for first, last in zip(corpus.starts, corpus.starts[1:], strict=False)]


def _count(mask: npt.NDArray[np.bool_], corpus: Corpus) -> Counts:
    return np.array([np.count_nonzero(part) for part in split(mask, corpus)], np.int64)


def _view_phase(history: PhaseHistory, run: Run, trajectories: Trajectories, corpus: Corpus) -> PhaseView:
    ids, nll = history.block_ids, history.nll
    recorded = nll[history.recorded]
    served = np.zeros(trajectories.n_blocks, np.bool_)
    served[ids] = True
    return PhaseView(
        planned=history.planned,
        samples_so_far=len(nll),
        distinct=int(np.count_nonzero(served)),
        mean_loss=float(recorded.mean(dtype=np.float64)) if len(recorded) else float("nan"),
        visits_by_domain=np.zeros(0, np.int64),
        visits_by_event=trajectories.record(ids, nll),
        step_losses=_step_losses(history),
        focus=_view_focus(history, run.plan.in_scope(history.planned), corpus),
        verdict=history.verdict,
    )


def _step_losses(history: PhaseHistory) -> Doubles:
    starts = np.arange(0, len(history.nll), history.planned.global_batch_size)
    if not len(starts):
        return np.empty(0)
    sums = np.add.reduceat(np.where(history.recorded, history.nll, 0).astype(np.float64), starts)
    counts = np.add.reduceat(history.recorded.astype(np.float64), starts)
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / counts)


def _view_focus(history: PhaseHistory, in_scope: npt.NDArray[np.bool_], corpus: Corpus) -> FocusView | None:
    if history.selection is None:
        return None
    unseen = np.isnan(history.scores) & in_scope
    left_out = history.selection.left_out(history.scores)
    dropped = left_out & ~unseen & in_scope
    starts = history.selection.starts if isinstance(history.selection, BlendSelection | ScopedSelection) else None
    return FocusView(
        _count(in_scope, corpus),
        BlockSet.of(dropped, ~unseen & in_scope, starts),
        _count(dropped, corpus),
        _count(dropped & ~history.selection.easiest(history.scores), corpus),
        _count(unseen, corpus),
        _count(left_out & unseen, corpus),
    )


def _finish_phase(views: list[PhaseView], ledger: Ledger, corpus: Corpus, visits_before: Counts) -> Counts:
    """Complete the last view with what is known once its phase has been replayed. Returns the visits so far."""
    visits = np.array([part.sum(dtype=np.int64) for part in split(ledger.visits, corpus)])
    if views:
        view = views[-1]
        view.visits_by_domain = visits - visits_before
        if view.samples_so_far == view.planned.samples:
            view.losses = np.array([_histogram(part) for part in split(ledger.nll, corpus)])
    return visits


def _histogram(nll: npt.NDArray[np.float32]) -> Counts:
    """Count the blocks in each bin of loss, int64 [_BINS]; blocks without a loss are left out."""
    known = nll[~np.isnan(nll)]
    return np.bincount(np.minimum(known / np.float32(BIN), _BINS - 1).astype(np.int64), minlength=_BINS)


def quantile(counts: Counts, share: float) -> float:
    """Return the loss that `share` of the blocks are below, to the precision of a bin; NaN where there is no block."""
    if not counts.any():
        return float("nan")
    return BIN * float(np.searchsorted(np.cumsum(counts), share * counts.sum()) + 0.5)


class _Sample:
    """Evenly spaced blocks that are followed with several margins, to show how much depends on the margin."""

    def __init__(self, n_blocks: int) -> None:
        self.stride = -(-n_blocks // _SENSITIVITY_BLOCKS)
        size = -(-n_blocks // self.stride)
        self.trajectories = [Trajectories(size, margin) for margin in SENSITIVITY_MARGINS]

    def record(self, history: PhaseHistory) -> None:
        entries = np.flatnonzero(history.block_ids % self.stride == 0)
        ids, nll = history.block_ids[entries] // self.stride, history.nll[entries]
        for trajectories in self.trajectories:
            trajectories.record(ids, nll)

    def shares(self) -> list[tuple[float, float, float]]:
        rows = []
        for trajectories in self.trajectories:
            counts = np.bincount(trajectories.classes(), minlength=len(CLASSES))
            twice = counts[1:].sum()
            if twice:
                rows.append((trajectories.margin, float(counts[5:].sum() / twice), float(counts[6:].sum() / twice)))
        return rows
