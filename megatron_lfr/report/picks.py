"""The blocks that the page shows one by one: hardest, easiest, most forgotten, each with all its visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr import UNRECORDED, Ledger
from megatron_lfr.lfr.analysis import Losses, Run
from megatron_lfr.lfr.dynamics import Trajectories
from megatron_lfr.lfr.selection import Order

Steps = npt.NDArray[np.int64]

EACH = 6
"""Blocks of a kind."""


@dataclass(frozen=True)
class Block:
    """One block. steps, nll: its visits, in order. present: what its last loss amounts to now (detrended), nats.
    forgotten: how often its loss rose after a fall. setback: the most that it was above its lowest until then, nats."""

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


def pick_blocks(run: Run, ledger: Ledger, trajectories: Trajectories, trained: Sequence[Order]) -> Picks:
    """Hardest and easiest by what the last loss amounts to now; most forgotten by how often, then by how far.

    trained: the blocks of each phase's draws so far."""
    forgotten, setback = trajectories.forgotten(), trajectories.setback
    scores = ledger.detrended_scores()
    unseen = np.isnan(scores)
    hardest = _largest(np.where(unseen, -np.inf, scores))
    easiest = _largest(np.where(unseen, -np.inf, -scores))
    ties = setback / (1 + setback)  # below 1: only decides between blocks that were forgotten equally often
    most_forgotten = _largest(np.where(setback > 0, forgotten + ties, -np.inf))
    visits = _visits(run, trained, np.unique(np.concatenate((hardest, easiest, most_forgotten))))
    hard, easy, lost = (
        [Block(i, *visits[i], float(scores[i]), int(forgotten[i]), float(setback[i])) for i in ids.tolist()]
        for ids in (hardest, easiest, most_forgotten)
    )
    return Picks(hard, easy, lost)


def _largest(keys: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """The places of the EACH largest keys above minus infinity, descending; among equal ones the first."""
    count = min(EACH, len(keys))
    limit = np.partition(keys, len(keys) - count)[len(keys) - count]
    above = np.flatnonzero(keys > limit)
    level = np.flatnonzero(keys == limit)[: count - len(above)]
    chosen = np.concatenate((above, level))
    chosen = chosen[keys[chosen] > -np.inf]
    return chosen[np.argsort(-keys[chosen], kind="stable")]


def _visits(run: Run, trained: Sequence[Order], ids: npt.NDArray[np.int64]) -> dict[int, tuple[Steps, Losses]]:
    """(steps, losses) of all visits of each of `ids`."""
    wanted = np.zeros(run.plan.n_blocks, np.bool_)
    wanted[ids] = True
    found: dict[int, list[tuple[int, float]]] = {i: [] for i in ids.tolist()}
    for planned, order in zip(run.plan.phases, trained, strict=False):
        nll = run.journal.read(planned.index)
        assert nll is not None
        for place in np.flatnonzero(wanted[order[: len(nll)]]).tolist():
            if nll[place] != UNRECORDED:
                step = planned.first_step + place // run.plan.global_batch_size
                found[int(order[place])].append((step, nll[place]))
    return {
        i: (np.array([step for step, _ in visits], np.int64), np.array([loss for _, loss in visits], np.float32))
        for i, visits in found.items()
    }
