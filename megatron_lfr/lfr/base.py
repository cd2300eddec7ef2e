"""What a training loop asks of a curriculum, and how the processes of a run share orders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.plan import Plan
from megatron_lfr.lfr.selection import Order
from megatron_lfr.lfr.start import PhaseStart

BlockIds = npt.NDArray[np.int64]


class Sharing(Protocol):
    """Carries orders between the processes of a run. All of them make the same calls, at the same time."""

    def share_order(self, phase: int, order: Order | None) -> Order:
        """Return the order of a phase on every process, given the one that each node's leader has made; the other
        processes pass None. ValueError where leaders made different orders."""
        ...

    def broadcast(self, value: int) -> int:
        """Return the first process' value on all of them."""
        ...

    def compare(self, what: str, value: int | None) -> None:
        """Raise ValueError on every process where leaders have different values, which says of `what`; the other
        processes pass None. Needed where a function makes scores."""
        ...


class BaseCurriculum(ABC):
    """Follows a run through `plan`: knows which step is next, and which blocks the current phase visits.

    Training loops take either subclass: Curriculum, which makes the orders, or CurriculumFollower, which is given them.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.current: PhaseStart | None = None
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
        """Whether the next step belongs to a phase that has not been entered."""
        return self.current is None or self._next_step == self.current.planned.end_step

    @property
    def order(self) -> Order:
        """Ids of the current phase's samples, in the order of training; empty before the first."""
        return np.empty(0, np.uint32) if self.current is None else self.current.order

    @abstractmethod
    def enter_phase(self) -> PhaseStart:
        """Return the phase of the next step; at a boundary, make its order first."""

    @abstractmethod
    def record(self, step: int, nll_sum: npt.NDArray[np.floating], token_count: npt.NDArray[np.floating]) -> None:
        """Enter the losses of a step: for each row the summed NLL (nats) and the number of tokens that it covers, in
        the order of `block_ids(step)`, with or without the rows of padding."""

    def skip(self, step: int) -> None:
        """Enter a step that did not change the weights: its losses do not count, and its blocks keep their scores."""
        size = 0 if self.current is None else self.current.planned.global_batch_size
        nothing = np.zeros(size, np.float32)
        self.record(step, nothing, nothing)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the position in the run, as JSON-able values. All that it refers to is on disk when this returns."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position that `state_dict` gave."""

    def block_ids(self, step: int) -> BlockIds:
        """Return the block ids [global_batch_size] of a step of the current phase; its last step is padded with -1."""
        assert self.current is not None
        planned = self.current.planned
        if not planned.first_step <= step < planned.end_step:
            raise ValueError(f"step {step} is not in the current phase (phase {planned.index})")
        size = planned.global_batch_size
        first = (step - planned.first_step) * size
        ids = np.full(size, -1, np.int64)
        served = self.current.order[first : first + size]
        ids[: len(served)] = served
        return ids

    def remaining_steps(self) -> Iterator[tuple[int, BlockIds]]:
        """Yield (step, ids) from the next step to the end of the current phase, without waiting for their losses."""
        assert self.current is not None
        for step in range(self._next_step, self.current.planned.end_step):
            yield step, self.block_ids(step)

    def steps(self) -> Iterator[tuple[int, BlockIds]]:
        """Yield (step, ids) to the end of the run. ValueError if the next is asked for before a step is recorded."""
        while not self.finished:
            self.enter_phase()
            step = self._next_step
            yield step, self.block_ids(step)
            if self._next_step == step:
                raise ValueError(f"steps: step {step} is not recorded; call record() before asking for the next")

    def _check_recorded_step(self, step: int) -> None:
        if step != self._next_step or self.current is None or self.at_boundary:
            raise ValueError(f"record: expected step {self._next_step} of an entered phase, got step {step}")
