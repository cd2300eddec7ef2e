"""What metrics.jsonl says of a phase's order: where the phase starts, and anew where a branch changes its length.

"draws" and "draws_by_domain" count samples: keys on disk stay, since older runs and scripts have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_lfr import _C
from megatron_lfr.lfr import PlannedPhase
from megatron_lfr.lfr.selection import Order


def describe_order(planned: PlannedPhase, order: Order, domain_sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the length of a phase, and the blocks that its order visits: in all, different ones, and by domain.

    order: ids [planned.samples]. domain_sizes: number of blocks of each domain, in the order of their ids.
    """
    sizes = list(domain_sizes.values())
    served = np.zeros(sum(sizes), np.bool_)
    served[order] = True
    return {
        "draws": planned.samples,
        "steps": planned.steps,
        "distinct": int(served.sum()),
        "draws_by_domain": dict(zip(domain_sizes, _C.count_parts(order, sizes).tolist(), strict=True)),
        "order_hash": f"{_C.order_hash(order):016x}",
    }
