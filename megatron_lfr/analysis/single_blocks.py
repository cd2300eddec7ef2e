"""The most striking blocks of a run: hardest, easiest, most forgotten, each with all its visits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.forgetting import Trajectories
from megatron_lfr.analysis.replay import Losses, PhaseHistory, visits_of
from megatron_lfr.lfr import Ledger

Steps = npt.NDArray[np.int64]

EACH = 6
"""Number of blocks that are picked of each kind."""


@dataclass(frozen=True)
class Block:
    """One block. steps (from 1), nll: its visits with a loss, in order. present: what its last loss amounts to with the
    present weights (detrended), nats. forgotten: how often its loss rose after a fall. setback: the most that its loss
    has ever been above its lowest value until then, nats."""

    id: int
    steps: Steps
    nll: Losses
    present: float
    forgotten: int
    setback: float


@dataclass(frozen=True)
class Picks:
    """The picked blocks: of each kind EACH or fewer, the most striking first."""

    hardest: list[Block]
    easiest: list[Block]
    most_forgotten: list[Block]


def pick_blocks(phases: Iterable[PhaseHistory], ledger: Ledger, trajectories: Trajectories) -> Picks:
    """Pick the hardest and easiest blocks, by what the last loss amounts to now, and the most forgotten ones, by how
    often the loss rose after a fall, then by the setback.

    phases, ledger, trajectories: those of the run so far."""
    forgotten, setback = trajectories.forgotten(), trajectories.setback
    scores = ledger.detrended_scores()
    hardest, easiest = largest(scores, EACH), largest(-scores, EACH)
    ties = setback / (1 + setback)  # below 1: only decides between blocks that were forgotten equally often
    most_forgotten = largest(np.where(setback > 0, forgotten + ties, np.nan), EACH)
    visits = visits_of(phases, np.concatenate((hardest, easiest, most_forgotten)), len(scores))
    visits = visits[~np.isnan(visits["nll"])]

    def blocks(ids: npt.NDArray[np.int64]) -> list[Block]:
        return [
            Block(i, seen["step"], seen["nll"], float(scores[i]), int(forgotten[i]), float(setback[i]))
            for i in ids.tolist()
            for seen in [visits[visits["block"] == i]]
        ]

    return Picks(blocks(hardest), blocks(easiest), blocks(most_forgotten))


def largest(keys: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Return the indices of the `count` largest keys, descending, or of all if they are fewer. Of equal keys, the first
    come first; NaNs are left out."""
    known = np.flatnonzero(~np.isnan(keys))
    count = min(count, len(known))
    if not count:
        return known
    values = keys[known]
    limit = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > limit)
    level = np.flatnonzero(values == limit)[: count - len(above)]
    chosen = np.concatenate((above, level))
    return known[chosen[np.argsort(-values[chosen], kind="stable")]]
