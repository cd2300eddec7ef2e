"""Where a run stands in its plan, and the order of the phase it is in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.blend import BlendSelection
from megatron_lfr.lfr.schedule import Plan, PlannedPhase
from megatron_lfr.lfr.selection import Order, Scores, Selection

BlockIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PhaseStart:
    """What was decided at a phase's boundary."""

    planned: PlannedPhase
    order_hash: int
    scores: Scores
    """Of all blocks; empty on a CurriculumFollower."""
    selection: Selection | BlendSelection | None


class Sharing(Protocol):
    """How the processes of a run come to one order. Each of them makes the same calls."""

    def share_order(self, phase: int, order: Order | None) -> Order:
        """The order of a phase that one process of each machine has made (the others give None), for all of them.
        ValueError where machines made different ones."""
        ...

    def broadcast(self, value: int) -> int:
        """The first process' value."""
        ...


class BaseCurriculum(ABC):
    """A run's way through `plan`: which step is next, and the ids of the current phase."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.current: PhaseStart | None = None
        self._order: Order = np.empty(0, np.uint32)
        self._next_step = 0

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
        """Ids of the current phase's samples, in the order of training."""
        return self._order

    @abstractmethod
    def enter_phase(self) -> PhaseStart:
        """The phase of the next step; at a boundary this makes its order."""

    @abstractmethod
    def record(self, step: int, nll_sum: npt.NDArray[np.floating], token_count: npt.NDArray[np.floating]) -> None:
        """Enter the losses of a step: per row the summed NLL (nats) and the number of tokens that it covers, in the
        order of `block_ids(step)`; rows of padding may be there or not."""

    def skip(self, step: int) -> None:
        """Enter a step that left the weights alone: nothing of it counts, and its blocks keep their scores."""
        nothing = np.zeros(self.plan.global_batch_size, np.float32)
        self.record(step, nothing, nothing)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """JSON-able place in the run. Everything that it refers to is on disk when this returns."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a place that `state_dict` gave."""

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
        """(step, ids) to the end of the run. ValueError when the next is asked for before a step is recorded."""
        while not self.finished:
            self.enter_phase()
            step = self._next_step
            yield step, self.block_ids(step)
            if self._next_step == step:
                raise ValueError(f"steps: step {step} is not recorded; call record() before asking for the next")

    def _check_recorded_step(self, step: int) -> None:
        if step != self._next_step or self.current is None or self.at_boundary:
            raise ValueError(f"record: expected step {self._next_step} of an entered phase, got step {step}")
