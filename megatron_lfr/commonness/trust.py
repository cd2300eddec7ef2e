"""Compares a corpus with trusted text: how much more likely a text is by it than by chance, and what is junk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_lfr.commonness.items import Int64s, Prefix
from megatron_lfr.commonness.likelihood import Floats, Likelihoods, count_ngrams, score
from megatron_lfr.commonness.repeats import Mask, repeats
from megatron_lfr.commonness.usual import Usual

LEAST_TRUSTED = 0.01
"""The share of the trusted text's own tokens whose ratio is as low as junk's. Ours."""
MOST_TRUSTED = 0.1
"""Most of them that may be in as little order as what is taken for junk. Ours."""
LEAST_DOCUMENTS = 100
"""Fewest documents, as `effective_number` counts them, whose spread tells what is in less order than trusted text.
Ours: with 50, documents of kinds that a few trusted ones happen to lack were taken for junk."""
MOST_TOKENS = 1000
"""Tokens of a document that count there. Ours: a longer one says hardly more of how much order its kind of text has."""


@dataclass(frozen=True)
class Trust:
    """The corpus by the trusted text: mean log-likelihoods, and ratios of documents and blocks, in nats a token.

    junk: mask [documents] of what is taken for junk. ratio_below, beyond_below: what puts a document there; None where
    it does not count.
    """

    likelihoods: Likelihoods
    documents: Floats
    blocks: Floats
    junk: Mask
    ratio_below: float
    beyond_below: float | None


def compare(
    corpus: Sequence[Prefix],
    by_corpus: Likelihoods,
    trusted: Sequence[Prefix],
    trusted_by_corpus: Likelihoods,
    size: tuple[int, int, int],
    junk_share: float | Literal["auto"],
) -> Trust:
    """Make the 4-gram model of the trusted text, and score both with it.

    by_corpus and trusted_by_corpus: the scores of both by the corpus' model, whose unigrams say what is chance. size:
    log2 of the table's counters, vocabulary, threads. junk_share: the share of the corpus' tokens to take for junk, by
    the ratio, or auto: documents whose ratio is lower than that of 99 % of the trusted text, and those that lie most
    below what their tokens usually have in it, as many as there are more of than in the trusted text, where that has
    LEAST_DOCUMENTS of MOST_TOKENS; but no document that repeats itself as text does. Each part of the trusted text is
    scored without itself.
    """
    log2_slots, vocab_size, threads = size
    model = count_ngrams(trusted, log2_slots, vocab_size, threads)
    usual = Usual(model, trusted, vocab_size, threads)
    likely = score(model, corpus, False, threads, usual)
    ratio, blocks = likely.documents - by_corpus.documents_unigram, likely.blocks - by_corpus.blocks_unigram
    if junk_share != "auto":
        ratio_below = token_quantile(ratio, lengths_of(corpus), junk_share)
        return Trust(likely, ratio, blocks, ratio < ratio_below, ratio_below, None)
    of_trusted, trusted_lengths = score(model, trusted, True, threads, usual), lengths_of(trusted)
    trusted_ratio = of_trusted.documents - trusted_by_corpus.documents_unigram
    ratio_below = token_quantile(trusted_ratio, trusted_lengths, LEAST_TRUSTED)
    junk, beyond_below = _junk(
        corpus, ratio < ratio_below, likely.documents_beyond, trusted, of_trusted.documents_beyond
    )
    return Trust(likely, ratio, blocks, junk, ratio_below, beyond_below)


def _junk(
    corpus: Sequence[Prefix], low: Mask, beyond: Floats, trusted: Sequence[Prefix], trusted_beyond: Floats
) -> tuple[Mask, float | None]:
    """Return which documents are junk, of low ratio or of less order than trusted ones, and below which order.

    The ratio finds random characters, and the order finds words in no order; these repeat no phrases, but bigrams, as a
    word has several tokens. Where the trusted text is too small for the order, the ratio has to find both.
    """
    lengths, trusted_lengths = (np.minimum(lengths_of(text), MOST_TOKENS) for text in (corpus, trusted))
    if effective_number(trusted_lengths) < LEAST_DOCUMENTS:
        return low & ~repeats(corpus, low).phrases, None
    limit = token_quantile(trusted_beyond, trusted_lengths, MOST_TRUSTED)
    repeating = repeats(corpus, low | (beyond < limit))
    beyond = np.where(repeating.phrases, np.float32(np.inf), beyond)
    of_trusted = np.where(repeats(trusted, trusted_beyond < limit).phrases, np.float32(np.inf), trusted_beyond)
    beyond_below = token_quantile(beyond, lengths, excess(beyond, lengths, of_trusted, trusted_lengths))
    return (low & ~repeating.bigrams) | (beyond < beyond_below), beyond_below


def lengths_of(prefixes: Sequence[Prefix]) -> Int64s:
    """Return the tokens of each document."""
    return np.concatenate([np.diff(prefix.offsets) for prefix in prefixes])


def token_quantile(ratio: Floats, lengths: Int64s, share: float) -> float:
    """Return the value below which documents have at most `share` of all tokens. 0 <= share < 1."""
    order = np.argsort(ratio, kind="stable")  # what has no tokens has no ratio, and comes last
    running = np.cumsum(lengths[order])
    return float(ratio[order[np.searchsorted(running, share * running[-1], side="right")]])


def effective_number(lengths: Int64s) -> float:
    """Return how many documents of one length would have a mean over tokens that is as well known (Kish 1965): fewer
    than there are where some hold most of the tokens."""
    squares = float((lengths.astype(np.float64) ** 2).sum())
    return float(lengths.sum()) ** 2 / squares if squares else 0.0


def excess(values: Floats, lengths: Int64s, trusted: Floats, trusted_lengths: Int64s) -> float:
    """Return the share of the tokens that can only be of documents which the trusted text has none of: the largest
    (F - T) / (1 - T), where F and T are the shares of both that lie below a value, for values below which there is at
    most MOST_TRUSTED of the trusted text (Blanchard, Lee & Scott 2010, Semi-supervised novelty detection)."""
    ours, theirs = (np.flatnonzero(lengths), np.flatnonzero(trusted_lengths))
    at = np.sort(values[ours])
    below, trusted_below = _below(values[ours], lengths[ours], at), _below(trusted[theirs], trusted_lengths[theirs], at)
    legal = trusted_below <= MOST_TRUSTED
    below, trusted_below = below[legal], trusted_below[legal]
    return float(((below - trusted_below) / (1 - trusted_below)).max(initial=0.0))


def _below(values: Floats, lengths: Int64s, at: Floats) -> npt.NDArray[np.float64]:
    """Return the share of the tokens that is in documents below each value."""
    order = np.argsort(values, kind="stable")
    running = np.concatenate(([0], np.cumsum(lengths[order])))
    shares: npt.NDArray[np.float64] = running[np.searchsorted(values[order], at)] / running[-1]
    return shares


def weights(near_copies: npt.NDArray[np.uint32], trust: Trust | None) -> Floats:
    """Return how much each document should count: 1 / near copies, and 0 for junk."""
    weight = (1 / near_copies).astype(np.float32)
    if trust is not None:
        weight[trust.junk] = 0
    return weight
