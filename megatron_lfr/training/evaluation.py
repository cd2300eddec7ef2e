"""Losses of blocks, and the mean loss, overall and by domain."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.blocks import PADDING, BlockSource
from megatron_lfr.data.corpus.loader import Loader, check_vocabulary
from megatron_lfr.engine import BlockLosses, Evaluator, PendingLosses
from megatron_lfr.lfr.rescoring import Rescore
from megatron_lfr.training.callbacks import Evaluation
from megatron_lfr.training.stopping import Stopping
from megatron_lfr.training.times import Stopwatch

Keep = Callable[[slice, BlockLosses], None]
Between = Callable[[], None]


def block_losses(
    engine: Evaluator, loader: Loader, ids: npt.NDArray[np.int64], between: Between = lambda: None
) -> Iterator[tuple[slice, BlockLosses]]:
    """The losses of blocks `ids` [n] under the present weights, batch by batch: (which of `ids`, their losses).
    Collective. The losses of a batch are read while the next one computes. `between` is called before each batch, and
    may raise on all ranks."""
    rows = engine.eval_rows
    computing: tuple[slice, PendingLosses] | None = None
    for batch in loader.iterate(_batches(ids, rows)):
        between()
        check_vocabulary(batch, engine.vocab_size)
        part = slice(batch.step * rows, min((batch.step + 1) * rows, len(ids)))
        launched = part, engine.eval_step(batch)
        if computing is not None:
            yield _read(*computing)
        computing = launched
    if computing is not None:
        yield _read(*computing)


def make_rescore(engine: Evaluator, loader: Loader, stopping: Stopping, times: Stopwatch) -> Rescore:
    """The forward-only pass behind score: rescored. It raises StoppedError where the run is to stop."""

    def rescore(block_ids: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
        for (_, losses), _ in times.each("rescoring", block_losses(engine, loader, block_ids, stopping.look)):
            yield (losses.nll_sum / np.maximum(losses.token_count, 1)).astype(np.float32)

    return rescore


def _batches(ids: npt.NDArray[np.int64], rows: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(number, ids [rows]) of each batch; the last one is padded."""
    for number, first in enumerate(range(0, len(ids), rows)):
        part = ids[first : first + rows]
        yield number, np.pad(part, (0, rows - len(part)), constant_values=PADDING)


def _read(part: slice, pending: PendingLosses) -> tuple[slice, BlockLosses]:
    losses, real = pending.wait(), part.stop - part.start
    return part, BlockLosses(losses.nll_sum[:real], losses.token_count[:real])


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
