"""The most striking blocks of a run: hardest, easiest, most forgotten, each with all its visits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.forgetting import Trajectories
from megatron_lfr.analysis.replay import Losses, PhaseHistory, Visits, visits_of
from megatron_lfr.lfr import Ledger

Steps = npt.NDArray[np.int64]

EACH = 6
"""Blocks of a kind."""


@dataclass(frozen=True)
class Block:
    """One block. steps (from 1), nll: its visits with a loss, in order. present: what its last loss amounts to now
    (detrended), nats. forgotten: how often its loss rose after a fall. setback: the most that it was above its lowest
    until then, nats."""

    id: int
    steps: Steps
    nll: Losses
    present: float
    forgotten: int
    setback: float


@dataclass(frozen=True)
class Picks:
    """Each EACH blocks or fewer, the most striking first."""

    hardest: list[Block]
    easiest: list[Block]
    most_forgotten: list[Block]


def pick_blocks(phases: Iterable[PhaseHistory], ledger: Ledger, trajectories: Trajectories) -> Picks:
    """Hardest and easiest by what the last loss amounts to now; most forgotten by how often, then by how far.

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
            for seen in [_visits_to(i, visits)]
        ]

    return Picks(blocks(hardest), blocks(easiest), blocks(most_forgotten))


def _visits_to(block: int, visits: Visits) -> Visits:
    chosen: Visits = visits[visits["block"] == block]
    return chosen


def largest(keys: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """The places of the `count` largest keys, or of fewer, descending; among equal ones the first. A NaN is no key."""
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
