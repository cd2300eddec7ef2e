"""The order of every phase of every preset, as a loop that uses the Python library gets it.

All from integers and single IEEE operations, so that the orders are the same on every machine.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from megatron_lfr.lfr import PRESETS, Blend, Curriculum, Journal, Plan, Schedule, preset

N_BLOCKS = 2003
SEQ_LENGTH = 16
BATCH = 32
SKIPPED_STEP = 5
STARTS = [0, 301, 302, N_BLOCKS]
BLENDS: dict[str, Blend | None] = {
    "no blend": None,
    "weights": Blend(STARTS, [1.0, 0.01, 2.0]),
    "weights, per-corpus": Blend(STARTS, [1.0, 0.01, 2.0], "per-corpus"),
    "per-corpus": Blend(STARTS, focus_scope="per-corpus"),
}
OLD = [0, 301, 302]
"""The corpora of the first segment of a run that is extended; those of the second are STARTS."""
EXTENDED = ("lfr", "lfr-v1", "lfr-clusters", "uniform", "random-focus", "rescored.yaml")
"""Schedules that are also trained twice, over OLD and then over STARTS."""
SCHEDULES = Path(__file__).parents[1] / "golden" / "schedules"

Orders = dict[str, list[str] | None]


def schedules() -> dict[str, Schedule]:
    """Return the presets and the schedule files, by name."""
    files = {
        path.name: Schedule.from_dicts(yaml.safe_load(path.read_text())) for path in sorted(SCHEDULES.glob("*.yaml"))
    }
    return {name: preset(name) for name in PRESETS} | files


def names() -> list[str]:
    """Return the names of the schedules, and of those of runs that are extended."""
    return [*schedules(), *(f"{name}, extended" for name in EXTENDED)]


def all_orders() -> dict[str, Orders]:
    """By schedule and by blend, what `orders_of` says of each phase."""
    return {name: {label: orders_of(name, blend) for label, blend in BLENDS.items()} for name in names()}


def orders_of(name: str, blend: Blend | None) -> list[str] | None:
    """Of each phase: its first step, the order's hash that checkpoints hold, and a hash of all rows that were served,
    padding included. None where the schedule is refused for this blend, since a pass has no length."""
    schedule = schedules()[name.removesuffix(", extended")]
    budget = {"train_epochs": 2.5} if schedule.in_shares else {}
    try:
        if name.endswith(", extended"):
            plan = extended_plan(schedule, blend)
        else:
            plan = schedule.plan(N_BLOCKS, SEQ_LENGTH, BATCH, blend=blend, **budget)
    except ValueError:
        return None
    return orders_of_plan(plan)


def extended_plan(schedule: Schedule, blend: Blend | None) -> Plan:
    """Plan two segments with this schedule; the second has more blocks, replays, and has another batch size."""
    old, new = Blend(OLD), Blend(STARTS)
    if blend is not None:
        weights = blend.weights
        old = Blend(OLD, None if weights is None else weights[:2], blend.focus_scope)
        new = blend
    budgets = [{"train_epochs": 2.5}, {"train_iters": 90}] if schedule.in_shares else [{}, {}]
    first = schedule.plan(OLD[-1], SEQ_LENGTH, BATCH, blend=old, **budgets[0])
    if schedule.phases[0].kind != "focus":
        schedule = Schedule((replace(schedule.phases[0], replay=0.25), *schedule.phases[1:]))
    return schedule.plan(N_BLOCKS, SEQ_LENGTH, BATCH // 2, blend=new, past=first, **budgets[1])


def orders_of_plan(plan: Plan) -> list[str]:
    """Return what `orders_of` does, of the phases of a plan."""
    heads: list[str] = []
    served = [hashlib.blake2b(digest_size=8) for _ in plan.phases]
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), {})
        curriculum = Curriculum(plan, journal, 17, rescored_losses, arrays=outside_arrays())
        for step, block_ids in curriculum.steps():
            start = curriculum.current
            assert start is not None
            if start.planned.index == len(heads):
                heads.append(f"{step} {start.order_hash:016x}")
            served[start.planned.index].update(block_ids.astype("<i8").tobytes())
            if step == SKIPPED_STEP:
                curriculum.skip(step)
            else:
                curriculum.record(step, *losses(block_ids, step))
    return [f"{head} {rows.hexdigest()}" for head, rows in zip(heads, served, strict=True)]


def losses(block_ids: npt.NDArray[np.int64], step: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(nll_sum, token_count) [n] of a model that learns, unevenly and with noise: multiples of 2^-10 nats. Some rows
    have no token, a loss that is not finite, or fewer tokens."""
    counts = np.where(block_ids >= 0, SEQ_LENGTH, 0).astype(np.float32)
    counts[block_ids % 29 == 3] = 5
    luck = _mixed(block_ids * 8191 + step)
    nll = np.floor((2 + 4 * _mixed(block_ids) + luck / 2 + 6 * 64 / (64 + step)) * 1024) / 1024
    sums = (nll * counts).astype(np.float32)
    sums[luck < 0.004] = np.nan
    counts[luck > 0.996] = 0
    return sums, counts


def rescored_losses(block_ids: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
    """Return the losses of a forward-only pass, in batches."""
    for part in np.array_split(block_ids, max(1, len(block_ids) // 100)):
        yield (np.floor(_mixed(part + 77) * 5 * 1024) / 1024).astype(np.float32)


def outside_arrays() -> dict[str, npt.NDArray[np.number]]:
    """Numbers of blocks from outside of the run, as a schedule names them: a reference's losses, weights of which an
    eighth are 0, and groups of copies."""
    blocks = np.arange(N_BLOCKS)
    weights = np.maximum(0, np.floor(_mixed(blocks + 5) * 1024) - 128) / 256
    return {
        "ref": (np.floor((2 + 3 * _mixed(blocks + 3)) * 1024) / 1024).astype(np.float32),
        "weights": weights.astype(np.float32),
        "copies": np.where(_mixed(blocks + 11) < 0.4, blocks // 100, blocks).astype(np.uint32),
    }


def _mixed(values: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2^-16, as if at random."""
    hashed = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    hashed = (hashed ^ (hashed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (hashed >> np.uint64(48)).astype(np.float64) / 65536
