"""The curriculum of a process that is given its orders by its node's leader."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.base import BaseCurriculum, Sharing
from megatron_lfr.lfr.plan import Plan, PlannedPhase
from megatron_lfr.lfr.rescoring import Rescore, rescore_blocks
from megatron_lfr.lfr.start import PhaseStart


class CurriculumFollower(BaseCurriculum):
    """The curriculum of a process that is not its node's leader: it is given each order, and keeps neither losses nor
    a journal."""

    def __init__(self, plan: Plan, sharing: Sharing, rescore: Rescore | None = None) -> None:
        super().__init__(plan)
        self._sharing = sharing
        self._rescore = rescore

    def enter_phase(self) -> PhaseStart:
        if self.at_boundary:
            planned = self.plan.at_step(self._next_step)
            if planned.phase.is_rescored:
                assert self._rescore is not None
                n_blocks = self.plan.segments[planned.segment].n_blocks
                rescore_blocks(None, planned.index, n_blocks, self._rescore, self._sharing.broadcast)
            if planned.phase.scored_by_function is not None and self._sharing.broadcast(0):
                self._sharing.compare(f"phase {planned.index}: score {planned.phase.score}", None)
            self._take_order(planned)
        assert self.current is not None
        return self.current

    def record(self, step: int, nll_sum: npt.NDArray[np.floating], token_count: npt.NDArray[np.floating]) -> None:
        self._check_recorded_step(step)
        self._next_step = step + 1

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the leader has the state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next_step = int(state["step"])
        if int(state["phase"]) >= 0:
            self._take_order(self.plan.phases[int(state["phase"])])

    def _take_order(self, planned: PlannedPhase) -> None:
        order = self._sharing.share_order(planned.index, None)
        self.current = PhaseStart(planned, order, np.empty(0, np.float32), None, None)
