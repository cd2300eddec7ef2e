"""The curriculum: hands out the block ids of each step, takes back their losses, makes each phase's order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.fileio import fsync_directory
from megatron_lfr.lfr.journal import UNRECORDED, Journal
from megatron_lfr.lfr.ledger import Ledger
from megatron_lfr.lfr.schedule import Plan, PlannedPhase
from megatron_lfr.lfr.selection import Order, Scores, Selection, make_order, phase_seed

BlockIds = npt.NDArray[np.int64]
Rescore = Callable[[BlockIds], npt.NDArray[np.float32]]
"""Given block ids [n], the mean NLL of each under the present weights, fp32 [n], without training."""

_RESCORE_CHUNK = 1024


@dataclass(frozen=True)
class PhaseStart:
    """What was decided at a phase's boundary."""

    planned: PlannedPhase
    order_hash: int
    scores: Scores
    selection: Selection | None


@dataclass
class Cost:
    """Seconds that the curriculum itself has taken so far."""

    record: float = 0.0
    order: float = 0.0
    rescore: float = 0.0


class Curriculum:
    """Drives a run of `plan`, step by step.

    A loop asks for the ids of each step and records their losses, in order; a phase can be entered only when every
    step before it has been recorded, since its order is made from those losses.

        for step, block_ids in curriculum.steps():            # -1: a padded row of a phase's last step
            curriculum.record(step, nll_sum, token_count)

    rescore: needed where a phase's score mode is `rescored`.
    """

    def __init__(self, plan: Plan, journal: Journal, seed: int, rescore: Rescore | None = None) -> None:
        if rescore is None and any(p.phase.kind == "focus" and p.phase.score == "rescored" for p in plan.phases):
            raise ValueError("the schedule has a phase with score: rescored, but no rescore callback is given")
        self.plan = plan
        self.journal = journal
        self.seed = seed
        self.cost = Cost()
        self.current: PhaseStart | None = None
        self._rescore = rescore
        self._order: Order = np.empty(0, np.uint32)
        self._next_step = 0
        self._fresh = True
        self.ledger = Ledger(plan.n_blocks, plan.total_steps)

    @property
    def next_step(self) -> int:
        """The first step that has not been recorded."""
        return self._next_step

    @property
    def finished(self) -> bool:
        return self._next_step == self.plan.total_steps

    @property
    def at_boundary(self) -> bool:
        """Whether the next step needs a phase that has not been entered."""
        return self.current is None or self._next_step == self.current.planned.end_step

    @property
    def order(self) -> Order:
        """Ids of the current phase's draws, in the order of training."""
        return self._order

    def enter_phase(self) -> PhaseStart:
        """The phase of the next step; at a boundary this makes its order."""
        if self._fresh:
            self.journal.rewind(-1, 0)
            self.journal.drop_scores(0)
            self._fresh = False
        if self.at_boundary:
            planned = self.plan.at_step(self._next_step)
            self._begin(planned)
            self.journal.begin_phase(planned.index)
        assert self.current is not None
        return self.current

    def block_ids(self, step: int) -> BlockIds:
        """Ids [global_batch_size] of a step of the current phase; the phase's last step is padded with -1."""
        assert self.current is not None
        planned = self.current.planned
        if not planned.first_step <= step < planned.end_step:
            raise ValueError(f"step {step} is not in the current phase (phase {planned.index})")
        size = self.plan.global_batch_size
        first = (step - planned.first_step) * size
        ids = np.full(size, -1, np.int64)
        served = self._order[first : first + size]
        ids[: len(served)] = served
        return ids

    def remaining_steps(self) -> Iterator[tuple[int, BlockIds]]:
        """(step, ids) from the next step to the end of the current phase; may run ahead of the records."""
        assert self.current is not None
        for step in range(self._next_step, self.current.planned.end_step):
            yield step, self.block_ids(step)

    def steps(self) -> Iterator[tuple[int, BlockIds]]:
        """(step, ids) to the end of the run; record each step before asking for the next."""
        while not self.finished:
            self.enter_phase()
            yield self._next_step, self.block_ids(self._next_step)

    def record(self, step: int, nll_sum: npt.NDArray[np.floating], token_count: npt.NDArray[np.floating]) -> None:
        """Enter the losses of a step: per row the summed NLL (nats) and the number of tokens that it covers.

        Rows of padding are ignored. A row without tokens, or whose loss is not finite (a skipped step), is journaled
        as UNRECORDED and leaves the block's score as it was.
        """
        started = time.perf_counter()
        if step != self._next_step or self.current is None or self.at_boundary:
            raise ValueError(f"record: expected step {self._next_step} of an entered phase, got step {step}")
        ids = self.block_ids(step)
        real = int((ids >= 0).sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            nll = (np.asarray(nll_sum[:real]) / np.asarray(token_count[:real])).astype(np.float32)
        nll = np.where(np.isfinite(nll) & (nll >= 0), nll, UNRECORDED)
        self.ledger.record(step, ids[:real], nll)
        self.journal.append(nll)
        self._next_step = step + 1
        self.cost.record += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        """JSON-able place in the run. Everything that it refers to is on disk when this returns."""
        self.journal.sync()
        return {
            "step": self._next_step,
            "phase": self.journal.phase,
            "entries": self.journal.count,
            "order_hash": f"{self.current.order_hash:016x}" if self.current else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a place that `state_dict` gave: cuts the journal back to it and replays it into the ledger."""
        phase, entries, step = int(state["phase"]), int(state["entries"]), int(state["step"])
        self.ledger = Ledger(self.plan.n_blocks, self.plan.total_steps)
        self.current, self._next_step, self._fresh = None, 0, False
        self.journal.rewind(phase, entries)
        if phase < 0 or entries < self.plan.phases[phase].draws:
            self.journal.drop_scores(phase + 1)  # made by weights that this run has yet to reach
        for index in range(phase + 1):
            self._replay(self.plan.phases[index])
        if self._next_step != step:
            raise ValueError(f"{self.journal.folder}: replays to step {self._next_step}, the checkpoint is at {step}")
        if self.current is not None and f"{self.current.order_hash:016x}" != state["order_hash"]:
            raise ValueError(f"{self.journal.folder}: phase {phase} replays to another order than was trained on")

    def _replay(self, planned: PlannedPhase) -> None:
        self._begin(planned)
        entries = self.journal.read(planned.index)
        size = self.plan.global_batch_size
        for first in range(0, len(entries), size):
            ids = self._order[first : first + size][: len(entries) - first]
            self.ledger.record(self._next_step, ids.astype(np.int64), entries[first : first + size])
            self._next_step += 1

    def _begin(self, planned: PlannedPhase) -> None:
        """Make the order of a phase from the scores as they stand."""
        scores = self._scores(planned)
        started = time.perf_counter()
        self._order, selection = make_order(planned.phase, scores, planned.draws, self.seed, planned.index)
        self.current = PhaseStart(planned, _C.order_hash(self._order), scores, selection)
        self.cost.order += time.perf_counter() - started

    def _scores(self, planned: PlannedPhase) -> Scores:
        if planned.phase.kind != "focus" or planned.phase.score == "recorded":
            return self.ledger.recorded_scores()
        if planned.phase.score == "detrended":
            return self.ledger.detrended_scores()
        if planned.phase.score == "shuffled":
            return self.ledger.shuffled_scores(phase_seed(self.seed, -1 - planned.index))
        return self._rescored_scores(planned)

    def _rescored_scores(self, planned: PlannedPhase) -> Scores:
        """Score every block with the present weights; a pass that was interrupted goes on where it stopped."""
        path = self.journal.scores_path(planned.index)
        if not path.exists():
            started = time.perf_counter()
            self._run_rescoring(planned)
            self.cost.rescore += time.perf_counter() - started
        scores: Scores = np.load(path, allow_pickle=False)
        if scores.shape != (self.plan.n_blocks,) or scores.dtype != np.float32:
            raise ValueError(f"{path}: expected fp32 [{self.plan.n_blocks}], got {scores.dtype} {list(scores.shape)}")
        return scores

    def _run_rescoring(self, planned: PlannedPhase) -> None:
        assert self._rescore is not None
        partial = self.journal.partial_scores_path(planned.index)
        if not partial.exists() or partial.stat().st_size != _partial_bytes(self.plan.n_blocks):
            aside = partial.with_suffix(".new")
            fresh = np.lib.format.open_memmap(aside, "w+", np.float32, (self.plan.n_blocks,))
            fresh[:] = np.nan
            fresh.flush()
            aside.replace(partial)
        scores = np.lib.format.open_memmap(partial, "r+")
        for first in range(0, len(scores), _RESCORE_CHUNK):
            chunk = slice(first, min(first + _RESCORE_CHUNK, len(scores)))
            if np.isnan(scores[chunk]).any():
                scores[chunk] = self._rescore(np.arange(chunk.start, chunk.stop, dtype=np.int64))
                if not np.isfinite(scores[chunk]).all():
                    raise ValueError(
                        f"rescoring: blocks {chunk.start}..{chunk.stop - 1} have a loss that is not finite"
                    )
        scores.flush()
        partial.replace(self.journal.scores_path(planned.index))
        fsync_directory(self.journal.folder)


def _partial_bytes(n_blocks: int) -> int:
    return 128 + 4 * n_blocks
