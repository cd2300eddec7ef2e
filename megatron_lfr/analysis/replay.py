"""Replaying a run: what each phase trained on, and the loss of every block at every visit.

The orders are not stored: they are made again, from the journal and the seed. Nothing in the run folder is changed, and
a run that was killed, or is still training, may be looked at. Memory is a few arrays of a phase's samples and of the
number of blocks, one phase at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.lfr.blend import Blend, BlendSelection
from megatron_lfr.lfr.curriculum import start_phase
from megatron_lfr.lfr.journal import UNRECORDED, JournalReader
from megatron_lfr.lfr.ledger import Ledger
from megatron_lfr.lfr.schedule import Plan, PlannedPhase
from megatron_lfr.lfr.selection import Order, Scores, Selection
from megatron_lfr.run_folder import RunFolder

Losses = npt.NDArray[np.float32]

VISIT = np.dtype([("block", "<i8"), ("step", "<i8"), ("phase", "<i4"), ("nll", "<f4")])
"""A block was trained on: in which optimizer step (counted from 1, as in metrics.jsonl) and phase, and its mean NLL a
token before that step's update (nats; NaN where the step was skipped)."""
Visits = npt.NDArray[np.void]
"""Records of type VISIT."""

PHASE_MEAN = np.dtype([("phase", "<i4"), ("visits", "<i8"), ("blocks", "<i8"), ("nll", "<f8")])
"""A range of blocks in a phase: visits with a loss, different blocks among them, mean NLL of the visits (NaN: none)."""

STEP = np.dtype([("step", "<i8"), ("phase", "<i4"), ("blocks", "<i8"), ("nll", "<f8")])
"""An optimizer step (counted from 1): its phase, its blocks with a loss, and their mean NLL (NaN where none has)."""


@dataclass(frozen=True)
class PhaseHistory:
    """One phase, as far as it has come."""

    planned: PlannedPhase
    order: Order
    """Block ids [planned.samples] of the whole phase, trained on or not yet."""
    nll: Losses
    """Mean NLL a token (nats) of each sample so far, fp32 [n <= planned.samples]; UNRECORDED (-1) where a skipped step
    left none."""
    scores_at_start: Scores
    """What the order was made from: fp32 [n_blocks], higher is harder, NaN where a block had none."""
    selection: Selection | BlendSelection | None
    """What a focus phase left out."""
    global_batch_size: int

    @property
    def block_ids(self) -> Order:
        """The blocks trained on so far [n], one for each entry of `nll`."""
        return self.order[: len(self.nll)]

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The optimizer step, from 0, of each entry of `nll`: int64 [n]."""
        return self.planned.first_step + np.arange(len(self.nll), dtype=np.int64) // self.global_batch_size

    @property
    def recorded(self) -> npt.NDArray[np.bool_]:
        """Which entries of `nll` are losses [n]."""
        mask: npt.NDArray[np.bool_] = self.nll != UNRECORDED
        return mask

    @property
    def is_complete(self) -> bool:
        return len(self.nll) == self.planned.samples


@dataclass(frozen=True)
class Run:
    """A run folder that is only looked at."""

    folder: RunFolder
    plan: Plan
    seed: int
    blend: Blend

    @property
    def config(self) -> dict[str, Any]:
        """What `RunFolder.settings` says; empty where there is no config.yaml (a loop of one's own)."""
        return self.folder.settings() if self.folder.config_file.exists() else {}

    @property
    def journal(self) -> JournalReader:
        """The losses of every visit so far."""
        return self.folder.journal

    @property
    def corpus(self) -> tuple[str, ...]:
        """The digest of each prefix that was trained on; empty where that is not recorded."""
        return tuple(self.folder.identity().get("corpus", ()))

    def phases(self, ledger: Ledger | None = None) -> Iterator[PhaseHistory]:
        """The phases that have begun, in order.

        ledger: an `empty_ledger` to fill on the way. While a history is looked at, it holds what was known at that
        phase's start, after the last one everything. ValueError where the journal leads to an order that was not
        trained on.
        """
        ledger = self.empty_ledger() if ledger is None else ledger
        hashes = {e["phase"]: e.get("order_hash") for e in self.folder.events() if e.get("event") == "phase"}
        for planned in self.plan.phases:
            nll = self.journal.read(planned.index)
            if nll is None:
                return
            if len(nll) > planned.samples:
                raise ValueError(f"{self.journal.path(planned.index)}: holds {len(nll)} losses, not {planned.samples}")
            scores = start_phase(planned, ledger, self.seed, self.journal)
            order, selection = self.blend.make_order(planned.phase, scores, planned.samples, self.seed, planned.index)
            if hashes.get(planned.index) not in (None, f"{_C.order_hash(order):016x}"):
                raise ValueError(f"{self.journal.folder}: phase {planned.index} replays to another order than was used")
            history = PhaseHistory(planned, order, nll, scores, selection, self.plan.global_batch_size)
            yield history
            ledger.record_phase(planned.first_step, self.plan.global_batch_size, history.block_ids, nll)
            if not history.is_complete:
                return

    def empty_ledger(self) -> Ledger:
        """The ledger before the first step."""
        return Ledger(self.plan.n_blocks, self.plan.total_steps, self.blend)

    def ledger(self) -> Ledger:
        """The last loss of every block, its step, and the number of visits."""
        ledger = self.empty_ledger()
        for _ in self.phases(ledger):
            pass
        return ledger

    def visits(self, block_ids: npt.ArrayLike) -> Visits:
        """Every visit of the blocks, in the order of training."""
        return visits_of(self.phases(), block_ids, self.plan.n_blocks)

    def visits_at(self, step: int) -> Visits:
        """The visits of one optimizer step, counted from 1. ValueError where none is recorded for it."""
        for history in self.phases():
            first = (step - 1 - history.planned.first_step) * self.plan.global_batch_size
            if 0 <= first < len(history.nll):
                return _visits(history, np.arange(first, min(first + self.plan.global_batch_size, len(history.nll))))
        done = self.steps()["step"]
        there = f"1 to {done[-1]}" if len(done) else "none"
        raise ValueError(f"step {step}: {self.journal.folder} has no record of it; recorded steps: {there}")

    def last_before(self, block_ids: npt.NDArray[np.int64], step: int) -> tuple[Losses, npt.NDArray[np.int64]]:
        """(NLL, step from 1) of each block's last recorded visit before `step`; (NaN, 0) where there is none."""
        ids, back = np.unique(block_ids, return_inverse=True)
        earlier = self.visits(ids)
        earlier = earlier[(earlier["step"] < step) & ~np.isnan(earlier["nll"])]
        nll, at = np.full(len(ids), np.nan, np.float32), np.zeros(len(ids), np.int64)
        places = np.searchsorted(ids, earlier["block"])
        nll[places], at[places] = earlier["nll"], earlier["step"]  # of several, the last stands
        return nll[back], at[back]

    def phase_means(self, first: int, last: int) -> npt.NDArray[np.void]:
        """The loss of the blocks from `first` to before `last` in each phase: records of type PHASE_MEAN."""
        return _joined([_phase_mean(history, first, last) for history in self.phases()], PHASE_MEAN)

    def steps(self) -> npt.NDArray[np.void]:
        """Every optimizer step so far: records of type STEP. A step that is being written may lack blocks."""
        return _joined([_steps(history) for history in self.phases()], STEP)


def visits_of(phases: Iterable[PhaseHistory], block_ids: npt.ArrayLike, n_blocks: int) -> Visits:
    """Every visit of the blocks in these phases of a run of `n_blocks` blocks, in the order of training."""
    wanted = np.zeros(n_blocks, np.bool_)
    wanted[np.asarray(block_ids, np.int64)] = True
    return _joined([_visits(history, np.flatnonzero(wanted[history.block_ids])) for history in phases], VISIT)


def _visits(history: PhaseHistory, entries: npt.NDArray[np.int64]) -> Visits:
    """Of a phase, the entries that are asked for."""
    found = np.empty(len(entries), VISIT)
    found["block"], found["phase"] = history.block_ids[entries], history.planned.index
    found["step"] = history.planned.first_step + 1 + entries // history.global_batch_size
    found["nll"] = np.where(history.recorded[entries], history.nll[entries], np.nan)
    return found


def _phase_mean(history: PhaseHistory, first: int, last: int) -> npt.NDArray[np.void]:
    members = history.recorded & (history.block_ids >= first) & (history.block_ids < last)
    seen = np.zeros(last - first, np.bool_)
    seen[history.block_ids[members] - first] = True
    visits = int(np.count_nonzero(members))
    mean = float(history.nll[members].mean(dtype=np.float64)) if visits else np.nan
    return np.array([(history.planned.index, visits, int(seen.sum()), mean)], PHASE_MEAN)


def _steps(history: PhaseHistory) -> npt.NDArray[np.void]:
    firsts = np.arange(0, len(history.nll), history.global_batch_size)
    found = np.empty(len(firsts), STEP)
    found["step"], found["phase"] = history.planned.first_step + 1 + np.arange(len(firsts)), history.planned.index
    if len(firsts):
        found["blocks"] = np.add.reduceat(history.recorded, firsts, dtype=np.int64)
        sums = np.add.reduceat(np.where(history.recorded, history.nll, 0), firsts, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            found["nll"] = sums / found["blocks"]
    return found


def _joined(parts: list[npt.NDArray[np.void]], kind: np.dtype[np.void]) -> npt.NDArray[np.void]:
    return np.concatenate(parts) if parts else np.empty(0, kind)


def open_run(folder: str | Path) -> Run:
    """The run in `folder`. ValueError where there is none, or where its journal or config.yaml is not readable."""
    run = RunFolder(folder)
    return Run(run, *run.plan())
