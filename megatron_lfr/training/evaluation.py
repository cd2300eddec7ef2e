"""Computes the losses of blocks, and their mean, overall and by domain."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_lfr.config.training import TrainingConfig
from megatron_lfr.data.corpus.blocks import PADDING
from megatron_lfr.data.corpus.loader import Loader, check_vocabulary
from megatron_lfr.engine import BlockLosses, Evaluator, PendingLosses
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.rescoring import Rescore
from megatron_lfr.training.stopping import StoppedError, Stopping
from megatron_lfr.training.times import Stopwatch

Keep = Callable[[slice, BlockLosses], None]
Between = Callable[[], None]


@dataclass(frozen=True)
class Evaluation:
    """Mean validation loss per token (nats), overall and by domain."""

    step: int
    phase: int
    loss: float
    tokens: int
    domains: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def block_losses(
    engine: Evaluator, loader: Loader, ids: npt.NDArray[np.int64], between: Between = lambda: None
) -> Iterator[tuple[slice, BlockLosses]]:
    """Compute the losses of blocks `ids` [n] with the present weights; yields (which of `ids`, their losses) batch by
    batch. Collective. The losses of a batch are read while the next one computes. `between` is called before each
    batch, and may raise on all ranks."""
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
    """Make the forward-only pass of phases with score: rescored. It raises StoppedError where the run is to stop."""

    def rescore(block_ids: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
        for (_, losses), _ in times.each("rescoring", block_losses(engine, loader, block_ids, stopping.look)):
            yield (losses[0] / np.maximum(losses[1], 1)).astype(np.float32)

    return rescore


def _batches(ids: npt.NDArray[np.int64], rows: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield (number, ids [rows]) of each batch; the last one is padded."""
    for number, first in enumerate(range(0, len(ids), rows)):
        part = ids[first : first + rows]
        yield number, np.pad(part, (0, rows - len(part)), constant_values=PADDING)


def _read(part: slice, pending: PendingLosses) -> tuple[slice, BlockLosses]:
    return part, pending.wait()[:, : part.stop - part.start]


def evaluate(
    engine: Evaluator,
    loader: Loader,
    max_blocks: int | None,
    step: int,
    phase: int,
    keep: Keep | None = None,
    between: Between = lambda: None,
) -> Evaluation:
    """Compute the mean loss per token over `max_blocks` blocks of the loader's source (None: all of them). Collective.

    A limited evaluation takes evenly spaced blocks, so that every domain has its share. keep: is called with the losses
    of each batch of blocks, in the order of their ids. between: as in `block_losses`.
    """
    started = time.perf_counter()
    source = loader.source
    count = source.num_blocks if max_blocks is None else min(max_blocks, source.num_blocks)
    ids = np.arange(count, dtype=np.int64) * source.num_blocks // count
    nll, tokens = np.zeros(count), np.zeros(count)
    for part, losses in block_losses(engine, loader, ids, between):
        nll[part], tokens[part] = losses
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


class Validation:
    """Evaluates a run on its validation split: at every phase's end, and every --eval-interval steps."""

    def __init__(
        self,
        engine: Evaluator,
        loader: Loader,
        plan: Plan,
        config: TrainingConfig,
        stopping: Stopping,
        times: Stopwatch,
    ) -> None:
        self.is_owed = False
        """Whether a stop has cut the last evaluation short; it is made up for when the run continues."""
        self._engine, self._loader = engine, loader
        self._plan, self._interval = plan, config.eval_interval
        self._stopping, self._times = stopping, times
        blocks, batches = loader.source.num_blocks, config.eval_iters
        self.blocks = blocks if batches is None else min(blocks, batches * plan.global_batch_size)
        """Number of blocks of the validation split that an evaluation uses."""

    def is_due(self, done: int) -> bool:
        """Return whether --eval-interval asks for an evaluation after step `done`."""
        return self._interval is not None and done % self._interval == 0

    def run(self, done: int) -> Evaluation | None:
        """Evaluate after step `done`. None where there is nothing to evaluate on, or the run is to stop. Collective."""
        self.is_owed = self._loader.source.num_blocks > 0
        if not self.is_owed:
            return None
        phase = self._plan.at_step(done - 1).index
        with suppress(StoppedError), self._times.part("evaluation"):
            evaluation = evaluate(self._engine, self._loader, self.blocks, done, phase, between=self._stopping.look)
            self.is_owed = False
            return evaluation
        return None
