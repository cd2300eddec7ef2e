"""Validation loss, overall and by domain."""

from __future__ import annotations

import math
import time

import numpy as np

from megatron_lfr.data.blocks import BlockSource
from megatron_lfr.data.loader import Loader
from megatron_lfr.engine import Engine
from megatron_lfr.training.callbacks import Evaluation


def evaluate(
    engine: Engine,
    loader: Loader,
    source: BlockSource,
    max_blocks: int | None,
    step: int,
    phase: int,
) -> Evaluation:
    """Mean loss a token over `max_blocks` blocks of `source` (all of them by default). Collective.

    A limited evaluation takes evenly spaced blocks, so that every domain has its share.
    """
    started = time.perf_counter()
    rows = engine.eval_rows
    count = source.num_blocks if max_blocks is None else min(max_blocks, source.num_blocks)
    ids = np.arange(count, dtype=np.int64) * source.num_blocks // count
    padded = np.full(-(-count // rows) * rows, -1, np.int64)
    padded[:count] = ids
    nll, tokens = np.zeros(count), np.zeros(count)
    for batch in loader.iterate(enumerate(padded.reshape(-1, rows))):
        first = batch.step * rows
        real = min(rows, count - first)
        losses = engine.eval_step(batch)
        nll[first : first + real] = losses.nll_sum[:real]
        tokens[first : first + real] = losses.token_count[:real]
    domain = source.domain_of(ids)
    means = {
        name: math.fsum(nll[domain == i]) / math.fsum(tokens[domain == i])
        for i, name in enumerate(source.domains)
        if tokens[domain == i].any()
    }
    total = math.fsum(tokens)
    return Evaluation(step, phase, math.fsum(nll) / total, int(total), means, time.perf_counter() - started)
