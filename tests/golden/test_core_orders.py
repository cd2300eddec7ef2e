"""The orders that the C++ core makes never change, whatever calls it."""

from __future__ import annotations

import pytest

from megatron_lfr import _C
from support.order_samples import ORDERS, spread_scores

# Orders of 300,000 blocks. A change here changes the order of every run that resumes: never a side effect.
GOLDEN = {
    "permutation": 0xEAF38EEF7AADADA7,
    "shuffle_visits": 0x0AA80BDB2FA93198,
    "order_threshold": 0x93A82F02C11ED135,
    "order_visits": 0x3B6952B5748EBD64,
    "order_choice": 0xC18E1C29DE2B00DA,
    "interleave": 0x6B3D6B7A00F18C59,
    "order_threshold, both tails": 0x6F64F9097C661461,
    "order_visits, uniform with factors": 0xFDB2C05E443D1DC7,
    "order_choice, capped with factors": 0x3791155EDC003A9A,
    "draw_distinct": 0x4254A9EB702DD829,
    "take_turns": 0xB5F7F8FFE4CBCAB4,
    "visits_in_passes": 0x3C20228D6B5DE7B9,
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_never_change(name: str) -> None:
    assert _C.order_hash(ORDERS[name](spread_scores(300_000), 0)) == GOLDEN[name]


def test_an_order_of_nested_buckets_never_changes() -> None:
    hashes = {_C.order_hash(_C.permutation(6_000_000, 7, threads)) for threads in (1, 7)}
    assert hashes == {0x3849C7EC01B8E88E}
