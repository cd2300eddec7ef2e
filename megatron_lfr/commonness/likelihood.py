"""Computes mean log-likelihoods of documents and blocks under a hashed 4-gram model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.commonness.items import Int64s, Prefix

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Likelihoods:
    """Mean log-likelihoods in nats a token: of documents over all their tokens, NaN where there are none; of blocks
    over their `seq_length` labels. The unigram ones are by the same counts, without any context."""

    documents: Floats
    documents_unigram: Floats
    blocks: Floats
    blocks_unigram: Floats


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


def score(model: _C.NgramModel, prefixes: Sequence[Prefix], leave_out: bool, threads: int) -> Likelihoods:
    """Score every training document and block.

    leave_out, for a model of these prefixes themselves: each document, or section of items.SECTION tokens of a longer
    one, is scored by the counts of all others, so that nothing makes itself likely: neither a document, nor a block by
    what it repeats of itself within a document.
    """
    parts = [_score_prefix(model, prefix, leave_out, threads) for prefix in prefixes]
    return Likelihoods(*(np.concatenate(kind).astype(np.float32) for kind in zip(*parts, strict=True)))


def _score_prefix(model: _C.NgramModel, prefix: Prefix, leave_out: bool, threads: int) -> list[Doubles]:
    edges = (prefix.offsets, prefix.offsets, prefix.block_edges, prefix.block_edges)
    sums = [np.zeros(len(of_kind) - 1) for of_kind in edges]
    for batch in prefix.sections().batches():
        running = [_running_sum(logs) for logs in model.score(*batch.arguments(), leave_out, threads)]
        for target, of_kind, ends in zip(sums, edges, running * 2, strict=True):
            _add(target, of_kind, int(batch.starts[0]), ends)
    with np.errstate(invalid="ignore"):  # documents without tokens
        return [target / np.diff(of_kind) for target, of_kind in zip(sums, edges, strict=True)]


def _running_sum(values: Floats) -> Doubles:
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, dtype=np.float64, out=sums[1:])
    return sums


def _add(sums: Doubles, edges: Int64s, start: int, ends: Doubles) -> None:
    """Add to each item what it has of the tokens from `start` on. edges [items + 1]; ends: running sums over tokens."""
    stop = start + len(ends) - 1
    first = max(int(np.searchsorted(edges, start, side="right")) - 1, 0)
    last = min(int(np.searchsorted(edges, stop, side="left")), len(sums))
    if first < last:
        inside = np.clip(edges[first : last + 1], start, stop) - start
        sums[first:last] += np.diff(ends[inside])
