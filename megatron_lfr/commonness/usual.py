"""How likely each token usually is in trusted text, by itself and after the token before it (ours).

A document whose tokens are in no order has less than its tokens usually have, whatever its domain: domains differ in
how likely their words are, and shuffling leaves the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.commonness.items import Prefix, Spans

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.integer]

_PRIOR = 20.0
"""Every mean counts so many values of the mean of all, beside its own. Ours."""


class _Means:
    """The mean of a value by a key below `size`."""

    def __init__(self, size: int) -> None:
        self._counts, self._sums = np.zeros(size), np.zeros(size)

    def add(self, keys: Tokens, values: Floats) -> None:
        self._counts += np.bincount(keys, minlength=len(self._counts))
        self._sums += np.bincount(keys, values, minlength=len(self._sums))

    def of(self, keys: Tokens) -> Floats:
        """Return the mean of each key."""
        return self._table()[keys].astype(np.float32)

    def without(self, keys: Tokens, values: Floats) -> Floats:
        """Return the mean of each key without one of its values, which has been added."""
        sums, counts = self._sums[keys] - values + self._prior(), self._counts[keys] - 1 + _PRIOR
        return (sums / counts).astype(np.float32)

    def _table(self) -> npt.NDArray[np.float64]:
        return (self._sums + self._prior()) / (self._counts + _PRIOR)

    def _prior(self) -> float:
        return _PRIOR * float(self._sums.sum() / max(1.0, self._counts.sum()))


class Usual:
    """What the tokens of the trusted text have under its own 4-gram model, each section scored without itself."""

    def __init__(self, model: _C.NgramModel, trusted: Sequence[Prefix], vocab_size: int, threads: int) -> None:
        self._start = vocab_size  # comes before the first token of a document or section
        self._by_token, self._after = _Means(vocab_size), _Means(vocab_size + 1)
        for spans, logs in _scored(model, trusted, threads):
            self._by_token.add(self._tokens(spans)[0], logs)
        for spans, logs in _scored(model, trusted, threads):
            tokens, before = self._tokens(spans)
            self._after.add(before, logs - self._by_token.without(tokens, logs))

    def less(self, spans: Spans, logs: Floats) -> Floats:
        """Return by how much the log-likelihood of each token of other text is above what it usually has."""
        tokens, before = self._tokens(spans)
        return logs - self._by_token.of(tokens) - self._after.of(before)

    def less_without(self, spans: Spans, logs: Floats) -> Floats:
        """Return the same for the trusted text, where no token counts in what it usually has."""
        tokens, before = self._tokens(spans)
        beyond = logs - self._by_token.without(tokens, logs)
        return beyond - self._after.without(before, beyond)

    def _tokens(self, spans: Spans) -> tuple[Tokens, Tokens]:
        """Return the tokens of adjacent spans [n], and the token before each."""
        total = int(spans.lengths.sum())
        tokens: Tokens = spans.dataset.read(spans.starts[:1], total)[0].astype(np.int32)
        before = np.concatenate(([self._start], tokens[:-1]))
        firsts = np.cumsum(spans.lengths[:-1])
        before[firsts[firsts < total]] = self._start
        return tokens, before


def _scored(model: _C.NgramModel, prefixes: Sequence[Prefix], threads: int) -> Iterator[tuple[Spans, Floats]]:
    """Yield sections and the log-likelihood of each of their tokens, without the section's own counts."""
    for prefix in prefixes:
        for spans in prefix.sections().batches():
            yield spans, model.score(*spans.arguments(), True, threads)[0]
