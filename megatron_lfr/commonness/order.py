"""Tells whether the tokens of a document are in any order at all, from the document alone (ours).

Shuffled words and random characters are as likely to be equal at one distance as at any other. Text of every kind is
not: it comes back to a subject, goes on in lines or columns of like length, and says things twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_lfr.commonness.items import SECTION, Int64s, Prefix, Spans
from megatron_lfr.commonness.likelihood import Doubles

FIRST_LAG, LAST_LAG = 16, 64
"""Distances in tokens that are looked at: longer than a word, so that what words consist of does not count."""
LEAST_DISPERSION = 2.5
"""From which dispersion on tokens are in an order. Ours: in no order it is about 1, and higher one time in thirty; of
text of a thousand tokens and more it is higher in a third of the documents to nearly all of them, by the kind."""

_BATCH_TOKENS = 1 << 19
Mask = npt.NDArray[np.bool_]


def in_order(prefixes: Sequence[Prefix], chosen: Mask) -> Mask:
    """Return which of the chosen documents of all prefixes have their first items.SECTION tokens in an order, as far as
    can be told: a document of at most twice LAST_LAG tokens is too short for it. Of the others, none does."""
    parts, first = [np.zeros(0, bool)], 0
    for prefix in prefixes:
        documents = prefix.documents()
        rows = np.flatnonzero(chosen[first : first + len(documents.starts)])
        spans = Spans(prefix.dataset, documents.starts[rows], np.minimum(documents.lengths[rows], SECTION))
        for batch in spans.batches(_BATCH_TOKENS):
            enough = batch.lengths > 2 * LAST_LAG
            parts.append(enough & (dispersion(_tokens(batch), batch.lengths) >= LEAST_DISPERSION))
        first += len(documents.starts)
    mask: Mask = np.zeros(len(chosen), bool)
    mask[chosen] = np.concatenate(parts)
    return mask


def dispersion(tokens: npt.NDArray[np.int64], lengths: Int64s) -> Doubles:
    """Return how much more the number of equal tokens varies from distance to distance than by chance [documents]: the
    mean over lags of (observed - expected)^2 / expected, which is Pearson's chi-square by its degrees of freedom,
    divided by the mean length of a run of tokens that are equal at a lag, since words of k tokens are so all at once.

    tokens: of the documents, end to end. Expected are at each lag as many as at all distances: Friedman's index of
    coincidence (1922), the share of equal pairs, times the pairs that there are. 0 where no two tokens are equal.
    """
    document = np.repeat(np.arange(len(lengths)), lengths)
    keys = document * (1 + int(tokens.max(initial=0))) + tokens  # tokens of two documents are never equal
    _, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
    equal_pairs = np.bincount(document, (counts[numbers] - 1) / 2, minlength=len(lengths))
    coincidence = equal_pairs / np.maximum(1, lengths * (lengths - 1) / 2)
    numbers = numbers.astype(np.int32)  # half as much to compare
    total, pairs, runs = np.zeros((3, len(lengths)))
    for lag in range(FIRST_LAG, LAST_LAG + 1):
        equal = np.flatnonzero(numbers[lag:] == numbers[:-lag])
        begins = equal[np.diff(equal, prepend=-2) > 1]
        observed, begun = (np.bincount(document[at], minlength=len(lengths)) for at in (equal, begins))
        expected = coincidence * np.maximum(0, lengths - lag)
        total += np.divide((observed - expected) ** 2, expected, out=np.zeros_like(expected), where=expected > 0)
        pairs, runs = pairs + observed, runs + begun
    return total / (LAST_LAG - FIRST_LAG + 1) * np.maximum(1, runs) / np.maximum(1, pairs)


def _tokens(spans: Spans) -> npt.NDArray[np.int64]:
    rows = [spans.dataset.read(spans.starts[i : i + 1], int(spans.lengths[i]))[0] for i in range(len(spans.starts))]
    return np.concatenate(rows).astype(np.int64)
