"""A score of one's own: how hard a block is for its domain, so that no Focus fills up with the hardest domain.

PYTHONPATH=examples megatron-lfr train ... --lfr-schedule "[{kind: learn, duration: 1}, {kind: review, duration: 1},
    {kind: focus, duration: 0.5, drop: 0.5, score: 'call:score_function:rank_within_domain'}]"
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.functions import Records


def rank_within_domain(records: Records) -> npt.NDArray[np.float32]:
    """Return the share of a domain's blocks that have a lower loss; NaN for a block that was never trained on.

    Ranks are the same on every machine; a mean of many floats need not be.
    """
    scores = np.full(len(records.losses), np.nan, np.float32)
    for first, last in pairwise(records.starts):
        losses = records.losses[first:last]
        seen = np.flatnonzero(~np.isnan(losses))
        scores[first + seen[np.argsort(losses[seen], kind="stable")]] = np.arange(len(seen)) / max(1, len(seen))
    return scores
