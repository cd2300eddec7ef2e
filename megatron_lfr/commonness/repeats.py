"""Finds documents that repeat themselves, as text of every kind does: names, phrases, layout. Random characters repeat
nothing, and words in no order nothing longer than a word (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.commonness.items import SECTION, Int64s, Prefix, Spans

BIGRAMS = 3.0
"""How many times as many pairs of equal bigrams as its tokens alone would give make a document repeat itself. Ours: of
base64, hexadecimal and digits, documents have at most 1.2 times as many; text has 7 to 36 times as many, from a
thousand tokens on."""
PHRASES = 0.2
"""Which share of its pairs of equal 4-grams must go on for four tokens more for it to repeat phrases. Ours: so it is in
two of five documents of text from a thousand tokens on, and in one of fourteen whose words are shuffled."""
LEAST_PHRASES = 20
"""Fewest pairs of equal 8-grams of which that tells anything. Ours."""

_GRAMS = (1, 2, 4, 8)
_BATCH_TOKENS = 1 << 19
Mask = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Repeats:
    """What documents repeat: masks [documents]. bigrams: more of them than chance. phrases: of eight tokens, more than
    words in no order do."""

    bigrams: Mask
    phrases: Mask


def repeats(prefixes: Sequence[Prefix], chosen: Mask) -> Repeats:
    """Return which of the chosen documents of all prefixes repeat themselves within their first items.SECTION tokens;
    of the others, none does."""
    parts, first = [np.zeros((2, 0), bool)], 0
    for prefix in prefixes:
        documents = prefix.documents()
        rows = np.flatnonzero(chosen[first : first + len(documents.starts)])
        spans = Spans(prefix.dataset, documents.starts[rows], np.minimum(documents.lengths[rows], SECTION))
        parts += [
            _judge(equal_pairs(_tokens(batch), batch.lengths), batch.lengths) for batch in spans.batches(_BATCH_TOKENS)
        ]
        first += len(documents.starts)
    masks = np.zeros((2, len(chosen)), bool)
    masks[:, chosen] = np.concatenate(parts, axis=1)
    return Repeats(bigrams=masks[0], phrases=masks[1])


def equal_pairs(tokens: npt.NDArray[np.int64], lengths: Int64s) -> Doubles:
    """Return how many pairs of equal 1-, 2-, 4- and 8-grams each of some documents has: [documents, 4].

    tokens: of the documents, end to end. An n-gram is numbered by those of its halves, and a token by its document as
    well, so that an n-gram which runs from one document into the next equals no other.
    """
    document = np.repeat(np.arange(len(lengths)), lengths)
    pairs = np.zeros((len(lengths), len(_GRAMS)))
    keys = document * (1 + int(tokens.max(initial=0))) + tokens
    for column, n in enumerate(_GRAMS):
        unique, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
        pairs[:, column] = np.bincount(document[: len(keys)], (counts[numbers] - 1) / 2, minlength=len(lengths))
        keys = numbers[:-n] * len(unique) + numbers[n:]
    return pairs


def _judge(pairs: Doubles, lengths: Int64s) -> Mask:
    """Return which documents repeat bigrams, and which phrases [2, documents]."""
    of_tokens, of_bigrams, of_4_grams, of_8_grams = pairs.T
    equal_tokens = of_tokens / np.maximum(1, lengths * (lengths - 1) / 2)
    by_chance = equal_tokens**2 * (lengths - 1) * (lengths - 2) / 2
    bigrams = of_bigrams > BIGRAMS * np.maximum(1, by_chance)
    return np.stack([bigrams, (of_8_grams >= LEAST_PHRASES) & (of_8_grams > PHRASES * of_4_grams)])


def _tokens(spans: Spans) -> npt.NDArray[np.int64]:
    rows = [spans.dataset.read(spans.starts[i : i + 1], int(spans.lengths[i]))[0] for i in range(len(spans.starts))]
    return np.concatenate(rows).astype(np.int64)
