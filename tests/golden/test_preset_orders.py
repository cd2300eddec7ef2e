"""The order of every phase of every preset, and of a few other schedules, never changes: a run that is resumed under
another order is refused, and one that is repeated would train on something else."""

from __future__ import annotations

import pytest

from support import golden
from support.golden_orders import BLENDS, names, orders_of

STORED = golden.read(golden.ORDERS)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("schedule", sorted({*STORED, *names()}))
def test_orders_never_change(schedule: str, blend: str) -> None:
    orders = orders_of(schedule, BLENDS[blend])
    assert not golden.changes(STORED[schedule][blend], orders, f"{schedule}, {blend}")
