"""Losses of blocks, and the mean loss, overall and by domain."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.blocks import BlockSource
from megatron_lfr.data.loader import Loader, check_vocabulary
from megatron_lfr.engine import BlockLosses, Evaluator
from megatron_lfr.training.callbacks import Evaluation

Keep = Callable[[slice, BlockLosses], None]
Between = Callable[[], None]


def block_losses(
    engine: Evaluator, loader: Loader, ids: npt.NDArray[np.int64], between: Between = lambda: None
) -> Iterator[tuple[slice, BlockLosses]]:
    """The losses of blocks `ids` [n] under the present weights, batch by batch: (which of `ids`, their losses).
    `between` is called before each batch, and may raise on all ranks. Collective."""
    rows = engine.eval_rows
    padded = np.full(-(-len(ids) // rows) * rows, -1, np.int64)
    padded[: len(ids)] = ids
    for batch in loader.iterate(enumerate(padded.reshape(-1, rows))):
        between()
        check_vocabulary(batch, engine.vocab_size)
        part = slice(batch.step * rows, min((batch.step + 1) * rows, len(ids)))
        losses, real = engine.eval_step(batch), part.stop - part.start
        yield part, BlockLosses(losses.nll_sum[:real], losses.token_count[:real])


def evaluate(
    engine: Evaluator,
    loader: Loader,
    source: BlockSource,
    max_blocks: int | None,
    step: int,
    phase: int,
    keep: Keep | None = None,
    between: Between = lambda: None,
) -> Evaluation:
    """Mean loss a token over `max_blocks` blocks of `source` (all of them by default). Collective.

    A limited evaluation takes evenly spaced blocks, so that every domain has its share. keep: is given the losses of
    each batch of blocks, in the order of their ids. between: as in `block_losses`.
    """
    started = time.perf_counter()
    count = source.num_blocks if max_blocks is None else min(max_blocks, source.num_blocks)
    ids = np.arange(count, dtype=np.int64) * source.num_blocks // count
    nll, tokens = np.zeros(count), np.zeros(count)
    for part, losses in block_losses(engine, loader, ids, between):
        nll[part], tokens[part] = losses.nll_sum, losses.token_count
        if keep is not None:
            keep(part, losses)
    domain = source.domain_of(ids)
    means = {
        name: math.fsum(nll[domain == i]) / math.fsum(tokens[domain == i])
        for i, name in enumerate(source.domains)
        if tokens[domain == i].any()
    }
    total = math.fsum(tokens)
    return Evaluation(step, phase, math.fsum(nll) / total, int(total), means, time.perf_counter() - started)
