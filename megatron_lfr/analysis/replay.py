"""Replaying a run: what each phase trained on, and the loss of every block at every visit.

The orders are not stored: they are made again, from the journal and the seed. Nothing in the run folder is changed, and
the run may have been killed, or still be training. One phase is in memory at a time: a few arrays with an entry for
each of its samples or for each block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.journal import UNRECORDED, JournalReader
from megatron_lfr.lfr.ledger import Ledger
from megatron_lfr.lfr.plan import Plan
from megatron_lfr.lfr.scores import Arrays, by_segment
from megatron_lfr.lfr.selection import Order
from megatron_lfr.lfr.start import PhaseStart, start_phase
from megatron_lfr.run_folder import RunFolder

Losses = npt.NDArray[np.float32]

VISIT = np.dtype([("block", "<i8"), ("step", "<i8"), ("phase", "<i4"), ("nll", "<f4")])
"""A visit of a block: the optimizer step (counted from 1, as in metrics.jsonl) and the phase in which it was trained
on, and its mean NLL a token before that step's update (nats; NaN where the step was skipped)."""
Visits = npt.NDArray[np.void]
"""Records of type VISIT."""

PHASE_MEAN = np.dtype([("phase", "<i4"), ("visits", "<i8"), ("blocks", "<i8"), ("nll", "<f8")])
"""A range of blocks in a phase: visits with a loss, different blocks among them, and the visits' mean NLL (nats; NaN
where there are none)."""

STEP = np.dtype([("step", "<i8"), ("phase", "<i4"), ("blocks", "<i8"), ("nll", "<f8")])
"""An optimizer step (counted from 1): its phase, its blocks with a loss, and their mean NLL (nats; NaN where there are
none)."""


@dataclass(frozen=True)
class PhaseHistory(PhaseStart):
    """One phase, as far as it has come. Its order is that of the complete phase, whether trained on yet or not."""

    nll: Losses
    """Mean NLL a token (nats) of each sample so far, fp32 [n <= planned.samples]; UNRECORDED (-1) for the samples of
    skipped steps."""

    @property
    def block_ids(self) -> Order:
        """The blocks trained on so far [n], one for each entry of `nll`."""
        return self.order[: len(self.nll)]

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The optimizer step, from 0, of each entry of `nll`: int64 [n]."""
        return self.planned.first_step + np.arange(len(self.nll), dtype=np.int64) // self.planned.global_batch_size

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
    """A run that is only read."""

    folder: RunFolder
    plan: Plan
    seed: int
    arrays: Arrays | Sequence[Arrays] = field(default_factory=dict)
    """Those that phases name, fp32 or uint32 [blocks of the segment] each; or these for each segment."""

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the run; empty where there is no config.yaml (with a custom training loop)."""
        return self.folder.settings() if self.folder.config_file.exists() else {}

    @property
    def journal(self) -> JournalReader:
        """The journal, with the losses of all visits so far."""
        return self.folder.journal

    @property
    def corpus(self) -> tuple[str, ...]:
        """The digest of each prefix that was trained on; empty where none is recorded."""
        return tuple(self.folder.identity().get("corpus", ()))

    def phases(self, ledger: Ledger | None = None) -> Iterator[PhaseHistory]:
        """Yield the phases that have begun, in order.

        ledger: an `empty_ledger` to fill on the way. While a phase's history is in the caller's hands, the ledger holds
        what was known when that phase started; after the last one, it holds everything. ValueError where the journal
        leads to another order than the run was trained on.
        """
        ledger = self.empty_ledger() if ledger is None else ledger
        arrays = by_segment(self.plan, self.arrays)
        hashes = {e["phase"]: e.get("order_hash") for e in self.folder.events() if e.get("event") == "phase"}
        for planned in self.plan.phases:
            nll = self.journal.read(planned.index)
            if nll is None:
                return
            if len(nll) > planned.samples:
                raise ValueError(f"{self.journal.path(planned.index)}: holds {len(nll)} losses, not {planned.samples}")
            named = arrays[planned.segment]
            start = start_phase(self.plan, planned, ledger, self.seed, self.journal, named)
            if hashes.get(planned.index) not in (None, f"{start.order_hash:016x}"):
                raise ValueError(f"{self.journal.folder}: phase {planned.index} replays to another order than was used")
            history = PhaseHistory(planned, start.order, start.scores, start.selection, start.verdict, nll)
            yield history
            ledger.record_phase(planned.first_step, planned.global_batch_size, history.block_ids, nll)
            if not history.is_complete:
                return

    def empty_ledger(self) -> Ledger:
        """Return the ledger as it was before the first step."""
        return Ledger.of(self.plan)

    @property
    def ledger_bytes(self) -> int:
        """Memory that the ledger takes while the run trains, without the 2 bytes a block more in a Focus."""
        return Ledger.bytes_of(self.plan)

    def ledger(self) -> Ledger:
        """Replay the run. Returns each block's last loss, the step of that loss, and its number of visits."""
        ledger = self.empty_ledger()
        for _ in self.phases(ledger):
            pass
        return ledger

    def visits(self, block_ids: npt.ArrayLike) -> Visits:
        """Return every visit of the blocks, in the order of training."""
        return visits_of(self.phases(), block_ids, self.plan.n_blocks)

    def visits_at(self, step: int) -> Visits:
        """Return the visits of an optimizer step, counted from 1. ValueError where none are recorded for it."""
        for history in self.phases():
            size = history.planned.global_batch_size
            first = (step - 1 - history.planned.first_step) * size
            if 0 <= first < len(history.nll):
                return _visits(history, np.arange(first, min(first + size, len(history.nll))))
        done = self.steps()["step"]
        recorded = f"1 to {done[-1]}" if len(done) else "none"
        raise ValueError(f"step {step}: {self.journal.folder} has no record of it; recorded steps: {recorded}")

    def last_before(self, block_ids: npt.NDArray[np.int64], step: int) -> tuple[Losses, npt.NDArray[np.int64]]:
        """Return (NLL, step from 1) of each block's last recorded visit before `step`; (NaN, 0) where there is none."""
        ids, inverse = np.unique(block_ids, return_inverse=True)
        earlier = self.visits(ids)
        earlier = earlier[(earlier["step"] < step) & ~np.isnan(earlier["nll"])]
        nll, at = np.full(len(ids), np.nan, np.float32), np.zeros(len(ids), np.int64)
        entries = np.searchsorted(ids, earlier["block"])
        nll[entries], at[entries] = earlier["nll"], earlier["step"]  # where a block has several, the last one remains
        return nll[inverse], at[inverse]

    def phase_means(self, first: int, last: int) -> npt.NDArray[np.void]:
        """Return the mean loss of the blocks `first` to `last` - 1 in each phase: records of type PHASE_MEAN."""
        return _joined([_phase_mean(history, first, last) for history in self.phases()], PHASE_MEAN)

    def steps(self) -> npt.NDArray[np.void]:
        """Return every optimizer step so far: records of type STEP. A step that is being written may lack blocks."""
        return _joined([_steps(history) for history in self.phases()], STEP)


def visits_of(phases: Iterable[PhaseHistory], block_ids: npt.ArrayLike, n_blocks: int) -> Visits:
    """Return every visit of the blocks in these phases of a run of `n_blocks` blocks, in the order of training."""
    chosen = np.zeros(n_blocks, np.bool_)
    chosen[np.asarray(block_ids, np.int64)] = True
    return _joined([_visits(history, np.flatnonzero(chosen[history.block_ids])) for history in phases], VISIT)


def _visits(history: PhaseHistory, entries: npt.NDArray[np.int64]) -> Visits:
    """Return the visits that are the given entries of a phase's `nll`."""
    visits = np.empty(len(entries), VISIT)
    visits["block"], visits["phase"] = history.block_ids[entries], history.planned.index
    visits["step"] = history.planned.first_step + 1 + entries // history.planned.global_batch_size
    visits["nll"] = np.where(history.recorded[entries], history.nll[entries], np.nan)
    return visits


def _phase_mean(history: PhaseHistory, first: int, last: int) -> npt.NDArray[np.void]:
    members = history.recorded & (history.block_ids >= first) & (history.block_ids < last)
    seen = np.zeros(last - first, np.bool_)
    seen[history.block_ids[members] - first] = True
    visits = int(np.count_nonzero(members))
    mean = float(history.nll[members].mean(dtype=np.float64)) if visits else np.nan
    return np.array([(history.planned.index, visits, int(seen.sum()), mean)], PHASE_MEAN)


def _steps(history: PhaseHistory) -> npt.NDArray[np.void]:
    firsts = np.arange(0, len(history.nll), history.planned.global_batch_size)
    steps = np.empty(len(firsts), STEP)
    steps["step"], steps["phase"] = history.planned.first_step + 1 + np.arange(len(firsts)), history.planned.index
    if len(firsts):
        steps["blocks"] = np.add.reduceat(history.recorded, firsts, dtype=np.int64)
        sums = np.add.reduceat(np.where(history.recorded, history.nll, 0), firsts, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            steps["nll"] = sums / steps["blocks"]
    return steps


def _joined(parts: list[npt.NDArray[np.void]], kind: np.dtype[np.void]) -> npt.NDArray[np.void]:
    return np.concatenate(parts) if parts else np.empty(0, kind)


def open_run(folder: str | Path) -> Run:
    """Open the run in `folder`. ValueError where there is none, or where its journal or config.yaml cannot be read."""
    run = RunFolder(folder)
    return Run(run, *run.plan(), run.arrays())
