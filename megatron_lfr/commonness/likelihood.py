"""Computes mean log-likelihoods of documents and blocks under a hashed 4-gram model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.commonness.items import Int64s, Prefix
from megatron_lfr.commonness.usual import Usual

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Likelihoods:
    """Mean log-likelihoods in nats a token: of documents over all their tokens, NaN where there are none; of blocks
    over their `seq_length` labels. The unigram ones are by the same counts, without any context. documents_beyond: of
    documents, less what their tokens usually have; NaN where that was not asked for."""

    documents: Floats
    documents_unigram: Floats
    blocks: Floats
    blocks_unigram: Floats
    documents_beyond: Floats


def vocabulary_of(prefixes: Sequence[Prefix], threads: int) -> int:
    """Return one more than the largest token."""
    spans = (batch for prefix in prefixes for part in [prefix.sections()] for batch in part.batches())
    return 1 + max((_C.largest_token(*batch.arguments(), threads) for batch in spans), default=0)


def count_ngrams(prefixes: Sequence[Prefix], log2_slots: int, vocab_size: int, threads: int) -> _C.NgramModel:
    """Return the 4-gram model of all documents of the prefixes."""
    model = _C.NgramModel(log2_slots, vocab_size)
    for prefix in prefixes:
        for batch in prefix.sections().batches():
            model.count(*batch.arguments(), threads)
    return model


def score(
    model: _C.NgramModel, prefixes: Sequence[Prefix], leave_out: bool, threads: int, usual: Usual | None = None
) -> Likelihoods:
    """Score every training document and block. usual: what tokens usually have under this model.

    leave_out, for a model of these prefixes themselves: each document, or section of items.SECTION tokens of a longer
    one, is scored by the counts of all others, so that nothing makes itself likely: neither a document, nor a block by
    what it repeats of itself within a document.
    """
    parts = [_score_prefix(model, prefix, leave_out, threads, usual) for prefix in prefixes]
    return Likelihoods(*(np.concatenate(kind).astype(np.float32) for kind in zip(*parts, strict=True)))


def _score_prefix(
    model: _C.NgramModel, prefix: Prefix, leave_out: bool, threads: int, usual: Usual | None
) -> list[Doubles]:
    edges = (prefix.offsets, prefix.offsets, prefix.block_edges, prefix.block_edges, prefix.offsets)
    sums = [np.zeros(len(of_kind) - 1) for of_kind in edges]
    for batch in prefix.sections().batches():
        logs, unigrams = model.score(*batch.arguments(), leave_out, threads)
        values = [logs, unigrams]
        if usual is not None:
            values.append(usual.less_without(batch, logs) if leave_out else usual.less(batch, logs))
        running = [_running_sum(one) for one in values]
        for target, of_kind, ends in zip(sums, edges, [*running[:2], *running], strict=False):
            _add(target, of_kind, int(batch.starts[0]), ends)
    if usual is None:
        sums[-1][:] = np.nan
    with np.errstate(invalid="ignore"):  # documents without tokens
        return [target / np.diff(of_kind) for target, of_kind in zip(sums, edges, strict=True)]


def _running_sum(values: Floats) -> Doubles:
    sums = np.concatenate(([0.0], values))  # in fp64 first: the sum of fp32 with another type is many times slower
    return np.cumsum(sums, out=sums)


def _add(sums: Doubles, edges: Int64s, start: int, ends: Doubles) -> None:
    """Add to each item what it has of the tokens from `start` on. edges [items + 1]; ends: running sums over tokens."""
    stop = start + len(ends) - 1
    first = max(int(np.searchsorted(edges, start, side="right")) - 1, 0)
    last = min(int(np.searchsorted(edges, stop, side="left")), len(sums))
    if first < last:
        inside = np.clip(edges[first : last + 1], start, stop) - start
        sums[first:last] += np.diff(ends[inside])
