"""How blocks are learned and forgotten: where the loss of each block fell and rose over its visits.

The paper (arXiv 2409.06131) calls a block learned if its loss falls monotonically, unlearned if it rises, and forgotten
if it falls and then rises, possibly repeatedly. A recorded loss is noisy: taken literally, these words call almost
every block forgotten. So a change of direction counts only when it exceeds a margin (ours): the loss *falls* when it is
more than `margin` below its last peak, and *rises* when it is more than `margin` above its last trough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.journal import UNRECORDED

MARGIN = 0.1
"""Nats by which a loss must change to count as falling or rising (ours): 10 % of the perplexity."""

CLASSES = (
    "seen less than twice",
    "steady",
    "learned",
    "unlearned",
    "rose, then learned",
    "forgotten",
    "forgotten, relearned once",
    "forgotten, relearned several times",
)
"""The classes that `Trajectories.classes` numbers. steady: the loss neither fell nor rose. learned: it fell and never
rose. unlearned: it rose and never fell. rose, then learned: it rose, then fell for good. forgotten: it rose after a
fall, and has not fallen again. relearned: it fell again after that, once or several times."""

EVENTS = ("first visit", "no change", "learned", "relearned", "forgotten", "rose")
"""The kinds of visits that `Trajectories.record` counts. learned: the block's loss fell for the first time. relearned:
it fell after it had been forgotten. forgotten: it rose after a fall. rose: it rose, and had not fallen before. no
change: it went on in its direction, or by less than the margin."""

_CHUNK = 1 << 22


@dataclass
class Trajectories:
    """How the losses of `n_blocks` blocks fell and rose; takes 21 bytes a block.

    setback: fp32 [n_blocks], the most that a block's loss has ever been above its lowest value until then, nats.
    """

    n_blocks: int
    margin: float = MARGIN
    setback: npt.NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.margin < np.inf:
            raise ValueError(f"margin {self.margin}: must be a number of nats, at least 0")
        n = self.n_blocks
        self.setback = np.zeros(n, np.float32)
        self._best = np.full(n, np.inf, np.float32)
        self._high = np.full(n, -np.inf, np.float32)
        self._low = np.full(n, np.inf, np.float32)
        self._direction = np.zeros(n, np.int8)
        self._first = np.zeros(n, np.int8)
        self._falls = np.zeros(n, np.uint8)
        self._rises = np.zeros(n, np.uint8)
        self._seen = np.zeros(n, np.uint8)

    def record(self, block_ids: npt.NDArray[np.integer], nll: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Record visits, in the order of training: fp32 `nll` [n], the mean NLL a token (nats) of `block_ids` [n].
        Entries equal to UNRECORDED are skipped. Returns how many visits were of each kind of EVENTS: int64
        [len(EVENTS)]."""
        counts = np.zeros(len(EVENTS), np.int64)
        for first in range(0, len(nll), _CHUNK):
            values = nll[first : first + _CHUNK]
            known = values != UNRECORDED
            for ids, losses in _visits_one_at_a_time(block_ids[first : first + _CHUNK][known], values[known]):
                counts += self._record_distinct(ids, losses)
        return counts

    def forgotten(self) -> npt.NDArray[np.int64]:
        """Return how often each block's loss rose after it had fallen, int64 [n_blocks]; counted up to 255."""
        return np.where(self._falls > 0, self._rises.astype(np.int64) - (self._first > 0), 0)

    def relearned(self) -> npt.NDArray[np.int64]:
        """Return how often each block's loss fell again after that, int64 [n_blocks]; counted up to 254."""
        return np.maximum(self._falls.astype(np.int64) - 1, 0)

    def classes(self) -> npt.NDArray[np.uint8]:
        """Return the class of each block, as its index in CLASSES: uint8 [n_blocks]."""
        fell, rose = self._falls > 0, self._rises > 0
        relearned = self._falls > 1
        forgotten = fell & (self._rises > (self._first > 0))
        classes = np.select(
            [self._seen < 2, ~fell & ~rose, ~rose, ~fell, ~forgotten, ~relearned, self._falls == 2],
            np.arange(7, dtype=np.uint8),
            np.uint8(7),
        )
        return classes.astype(np.uint8)

    def _record_distinct(self, ids: npt.NDArray[Any], loss: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Record one visit of each of `ids`, which are all different."""
        seen = self._seen[ids]
        best = self._best[ids]
        self.setback[ids] = np.where(seen > 0, np.maximum(self.setback[ids], loss - best), 0)
        self._best[ids] = np.minimum(best, loss)
        self._seen[ids] = np.minimum(seen, 1) + 1
        direction = self._direction[ids]
        high, low = np.maximum(self._high[ids], loss), np.minimum(self._low[ids], loss)
        falls = (direction >= 0) & (high - loss > self.margin)
        rises = (direction <= 0) & (loss - low > self.margin)
        self._high[ids] = np.where(rises, loss, high)
        self._low[ids] = np.where(falls, loss, low)
        change = rises.astype(np.int8) - falls.astype(np.int8)
        self._direction[ids] = np.where(change != 0, change, direction)
        self._first[ids] = np.where(direction == 0, change, self._first[ids])
        fallen_before = self._falls[ids]
        self._falls[ids] = np.minimum(fallen_before.astype(np.int16) + falls, 255)
        self._rises[ids] = np.minimum(self._rises[ids].astype(np.int16) + rises, 255)
        known = fallen_before > 0
        first_visit, learned, relearned = (seen == 0).sum(), (falls & ~known).sum(), (falls & known).sum()
        forgotten, rose = (rises & known).sum(), (rises & ~known).sum()
        no_change = len(ids) - first_visit - learned - relearned - forgotten - rose
        return np.array([first_visit, no_change, learned, relearned, forgotten, rose], np.int64)


def _visits_one_at_a_time(
    ids: npt.NDArray[Any], losses: npt.NDArray[np.float32]
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.float32]]]:
    """Yield the visits in rounds, each of which visits a block once at most; a block's visits keep their order. The ids
    of a round ascend, so that memory is read in one direction."""
    keys = ids.astype(np.int64) * _CHUNK + np.arange(len(ids))  # sorts faster than a stable argsort of the ids
    keys.sort()
    ids, losses = keys // _CHUNK, losses[keys % _CHUNK]
    while len(ids):
        again = np.zeros(len(ids), np.bool_)
        again[1:] = ids[1:] == ids[:-1]
        yield ids[~again], losses[~again]
        ids, losses = ids[again], losses[again]
