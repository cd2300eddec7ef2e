"""The curriculum hands out the block ids of each step, takes back their losses, and makes each phase's order."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.base import BaseCurriculum, Sharing
from megatron_lfr.lfr.functions import call_function, check_functions, digest_of
from megatron_lfr.lfr.journal import UNRECORDED, Journal
from megatron_lfr.lfr.ledger import Ledger
from megatron_lfr.lfr.plan import Plan, PlannedPhase
from megatron_lfr.lfr.rescoring import Rescore, rescore_blocks, write_scores
from megatron_lfr.lfr.scores import NO_ARRAYS, Arrays, by_segment, check_arrays
from megatron_lfr.lfr.start import PhaseStart, start_phase


class Curriculum(BaseCurriculum):
    """Leads a run through `plan`, step by step.

    A training loop asks for the ids of each step and records their losses, in order. A phase can be entered only when
    every step before it has been recorded, since its order is made from those losses.

        for step, block_ids in curriculum.steps():            # -1: a padded row of a phase's last step
            curriculum.record(step, nll_sum, token_count)

    rescore: needed where a phase's score mode is `rescored`. sharing: needed where a run has several processes: one on
    each node, its leader, has a Curriculum, the others have a CurriculumFollower. arrays: those that phases name, with
    a number for each block of their segment, by name, or such a mapping for each segment; they are not copied.
    """

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        seed: int,
        rescore: Rescore | None = None,
        sharing: Sharing | None = None,
        arrays: Arrays | Sequence[Arrays] = NO_ARRAYS,
    ) -> None:
        super().__init__(plan)
        self.arrays = by_segment(plan, arrays)
        check_arrays(plan, self.arrays)
        if rescore is None and any(planned.phase.is_rescored for planned in plan.phases):
            raise ValueError("the schedule has a phase with score: rescored, but no rescore callback is given")
        self.journal = journal
        self.seed = seed
        self._rescore = rescore
        self._sharing = sharing
        self._fresh = True
        self._checksum = 0  # of all losses so far
        self.ledger = Ledger.of(plan)

    def enter_phase(self) -> PhaseStart:
        """Return the phase of the next step; at a boundary, make its order first."""
        if self._fresh:
            check_functions(self.plan)
            self.journal.rewind(-1, 0)
            self.journal.drop_scores(0)
            self._fresh = False
        if self.at_boundary:
            planned = self.plan.at_step(self._next_step)
            if planned.phase.is_rescored:
                self._run_rescoring(planned)
            if planned.phase.scored_by_function is not None:
                self._call_function(planned, planned.phase.scored_by_function)
            self._begin(planned)
            self._share_order()
            self.journal.begin_phase(planned.index)
        assert self.current is not None
        return self.current

    def record(self, step: int, nll_sum: npt.NDArray[np.floating], token_count: npt.NDArray[np.floating]) -> None:
        """Enter the losses of a step: for each row the summed NLL (nats) and the number of tokens that it covers.

        Both are [global_batch_size], in the order of `block_ids(step)`, or leave out the rows of padding, which are
        ignored. A row without tokens, or whose loss is not finite, is journaled as UNRECORDED, and its block keeps the
        score that it had; for a step that did not change the weights, call `skip` instead. ValueError for any step but
        the next, and for arrays of another shape.
        """
        self._check_recorded_step(step)
        ids = self.block_ids(step)
        real = int((ids >= 0).sum())
        for name, rows in (("nll_sum", nll_sum), ("token_count", token_count)):
            if np.shape(rows) not in ((real,), ids.shape):
                shape = list(np.shape(rows))
                raise ValueError(f"record: {name} has shape {shape}, but step {step} has {real} blocks")
        with np.errstate(divide="ignore", invalid="ignore"):
            nll = (np.asarray(nll_sum[:real]) / np.asarray(token_count[:real])).astype(np.float32)
        nll = np.where(np.isfinite(nll) & (nll >= 0), nll, UNRECORDED)
        self.ledger.record(step, ids[:real], nll)
        self.journal.append(nll)
        self._checksum = zlib.crc32(nll.data, self._checksum)
        self._next_step = step + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the run, as JSON-able values. All that it refers to is on disk when this returns."""
        self.journal.sync()
        return {
            "step": self._next_step,
            "phase": self.journal.phase,
            "entries": self.journal.count,
            "checksum": self._checksum,
            "order_hash": f"{self.current.order_hash:016x}" if self.current else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position that `state_dict` gave: replay the journal into the ledger and cut it back to there.
        ValueError where the journal does not lead to that position; the journal is then left as it was."""
        phase, entries, step = int(state["phase"]), int(state["entries"]), int(state["step"])
        self.ledger = Ledger.of(self.plan)
        self.current, self._next_step, self._fresh, self._checksum = None, 0, False, 0
        self.journal.close()
        self.journal.check_holds(phase, entries)
        for planned in self.plan.phases[: phase + 1]:
            self._replay(planned, entries if planned.index == phase else planned.samples)
        if self._next_step != step:
            reached = self._next_step
            raise ValueError(f"{self.journal.folder}: replays to step {reached}, but the checkpoint is at {step}")
        if self.current is not None and f"{self.current.order_hash:016x}" != state["order_hash"]:
            raise ValueError(f"{self.journal.folder}: phase {phase} replays to an order other than the one trained on")
        if self._checksum != state["checksum"]:
            raise ValueError(f"{self.journal.folder}: its losses are not those that led to the checkpoint")
        self.journal.rewind(phase, entries)
        if phase < 0 or entries < self.plan.phases[phase].samples:
            self.journal.drop_scores(phase + 1)  # they come from weights that this run has yet to reach
        if phase >= 0:
            self._share_order()

    def _replay(self, planned: PlannedPhase, count: int) -> None:
        """Replay the first `count` entries of a phase."""
        self._begin(planned)
        self.journal.check_holds(planned.index, count)
        entries = self.journal.reader().read(planned.index)
        assert entries is not None
        size = planned.global_batch_size
        self.ledger.record_phase(planned.first_step, size, self.order[:count], entries[:count])
        self._checksum = zlib.crc32(entries[:count].data, self._checksum)
        self._next_step = planned.first_step + -(-count // size)

    def _begin(self, planned: PlannedPhase) -> None:
        """Make the order of a phase from the present scores."""
        arrays = self.arrays[planned.segment]
        self.current = start_phase(self.plan, planned, self.ledger, self.seed, self.journal, arrays)

    def _share_order(self) -> None:
        if self._sharing is not None:
            assert self.current is not None
            shared = self._sharing.share_order(self.current.planned.index, self.current.order)
            self.current = replace(self.current, order=shared)

    def _run_rescoring(self, planned: PlannedPhase) -> None:
        assert self._rescore is not None
        n_blocks = self.plan.segments[planned.segment].n_blocks
        rescore_blocks(self.journal, planned.index, n_blocks, self._rescore, self._broadcast)

    def _call_function(self, planned: PlannedPhase, name: str) -> None:
        """Let a function make the scores of a phase, unless the journal has them already."""
        if not self._broadcast(not self.journal.scores_path(planned.index).exists()):
            return
        starts = self.plan.segments[planned.segment].blend.starts
        scores = call_function(name, planned, self.ledger, starts)
        if self._sharing is not None:
            self._sharing.compare(f"phase {planned.index}: score {planned.phase.score}", digest_of(scores))
        write_scores(self.journal, planned.index, scores)

    def _broadcast(self, value: int) -> int:
        return value if self._sharing is None else self._sharing.broadcast(value)
