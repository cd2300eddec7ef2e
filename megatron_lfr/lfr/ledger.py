"""What the model knows of every block now: a view derived from the journal."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.lfr.journal import UNRECORDED

# Steps over which the running mean training loss is averaged (ours).
TREND_HORIZON = 50


class Ledger:
    """Last loss, the step it was recorded at, and the number of visits of each block: 10 bytes a block.

    Attributes:
        nll: fp32 [n_blocks], mean negative log-likelihood a token (nats) when the block was last trained on; NaN
            where it never was.
        step: int32 [n_blocks], optimizer step of that record; -1 where there is none.
        visits: uint16 [n_blocks], times trained on, saturating.
        trend: fp64 [total_steps], running mean training loss of each step: an exponential mean over TREND_HORIZON
            steps, corrected for its start.
    """

    def __init__(self, n_blocks: int, total_steps: int) -> None:
        self.nll = np.full(n_blocks, np.nan, np.float32)
        self.step = np.full(n_blocks, -1, np.int32)
        self.visits = np.zeros(n_blocks, np.uint16)
        self.trend = np.full(total_steps, np.nan)
        self._weighted_sum = 0.0
        self._weight = 0.0

    def record(self, step: int, block_ids: npt.NDArray[np.integer], nll: npt.NDArray[np.float32]) -> None:
        """Enter one optimizer step: fp32 `nll` [n] of `block_ids` [n]. Entries equal to UNRECORDED leave a block as
        it was. Where a block occurs twice, the later entry stands."""
        known = nll != UNRECORDED
        ids, values = block_ids[known], nll[known]
        self.nll[ids] = values
        self.step[ids] = step
        unique, times = np.unique(ids, return_counts=True)
        self.visits[unique] = np.minimum(self.visits[unique].astype(np.int64) + times, np.iinfo(np.uint16).max)
        self._follow_trend(step, values)

    def record_phase(
        self, first_step: int, batch_size: int, block_ids: npt.NDArray[np.integer], nll: npt.NDArray[np.float32]
    ) -> None:
        """Enter many steps at once, `batch_size` draws each from `first_step` on (the last may be short): as `record`
        does step by step, to the last bit."""
        known = nll != UNRECORDED
        ids = block_ids[known]
        self.nll[ids] = nll[known]
        self.step[ids] = first_step + np.flatnonzero(known) // batch_size
        times = np.zeros(len(self.visits), np.uint32)
        np.add.at(times, ids, np.uint32(1))  # of its own type: with an int, NumPy takes ten times as long
        self.visits = np.minimum(self.visits + times, np.iinfo(np.uint16).max).astype(np.uint16)
        for number, first in enumerate(range(0, len(nll), batch_size)):  # each mean depends on the one before
            batch = slice(first, first + batch_size)
            self._follow_trend(first_step + number, nll[batch][known[batch]])

    def _follow_trend(self, step: int, values: npt.NDArray[np.float32]) -> None:
        if len(values):  # fsum is exact, so the mean does not depend on how a machine sums
            mean = math.fsum(values.tolist()) / len(values)
            decay = 1.0 - 1.0 / TREND_HORIZON
            self._weighted_sum = decay * self._weighted_sum + mean
            self._weight = decay * self._weight + 1.0
        if self._weight:
            self.trend[step] = self._weighted_sum / self._weight

    def recorded_scores(self) -> npt.NDArray[np.float32]:
        """The loss of each block when it was last trained on, fp32 [n_blocks]: the paper's score."""
        return self.nll.copy()

    def detrended_scores(self) -> npt.NDArray[np.float32]:
        """The same minus the running mean training loss of that step (ours): a block seen early was scored by a
        worse model than one seen late, and raw losses confound the two."""
        scores = self.nll.copy()
        seen = self.step >= 0
        scores[seen] = (self.nll[seen].astype(np.float64) - self.trend[self.step[seen]]).astype(np.float32)
        return scores

    def shuffled_scores(self, seed: int) -> npt.NDArray[np.float32]:
        """The recorded losses, dealt at random to the blocks that have one: a control without difficulty (ours)."""
        scores = self.nll.copy()
        seen = np.flatnonzero(~np.isnan(scores))
        scores[seen] = scores[seen][_C.permutation(len(seen), seed)]
        return scores
