"""Compares a corpus with trusted text: how much more likely a text is by it than by chance, and what is junk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_lfr.commonness.copies import Counts
from megatron_lfr.commonness.items import Int64s, Prefix
from megatron_lfr.commonness.junk import Ordered, counted, find_junk, token_quantile
from megatron_lfr.commonness.likelihood import Floats, Likelihoods, count_ngrams, score
from megatron_lfr.commonness.order import Mask
from megatron_lfr.commonness.usual import Usual

LEAST_TRUSTED = 0.01
"""The share of the trusted text's own tokens whose ratio is as low as junk's. Ours."""


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
    firsts: Mask,
    by_corpus: Likelihoods,
    trusted: Sequence[Prefix],
    trusted_by_corpus: Likelihoods,
    size: tuple[int, int, int],
    junk_share: float | Literal["auto"],
) -> Trust:
    """Make the 4-gram model of the trusted text, and score both with it.

    firsts: which documents of the corpus are no near copies of one before. by_corpus and trusted_by_corpus: the scores
    of both by the corpus' model, whose unigrams say what is chance. size: log2 of the table's counters, vocabulary,
    threads. junk_share: the share of the corpus' tokens to take for junk, by the ratio, or auto: documents whose ratio
    is lower than that of 99 % of the trusted text, and those that lie most below what their tokens usually have in it,
    as many as there are more of than in the trusted text, where that is large enough; but no document whose tokens show
    an order themselves. Each part of the trusted text is scored without itself.
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
    orders = (
        Ordered(corpus, likely.documents_beyond, firsts * counted(lengths_of(corpus))),
        Ordered(trusted, of_trusted.documents_beyond, counted(trusted_lengths)),
    )
    junk, beyond_below = find_junk(orders[0], ratio < ratio_below, orders[1])
    return Trust(likely, ratio, blocks, junk, ratio_below, beyond_below)


def lengths_of(prefixes: Sequence[Prefix]) -> Int64s:
    """Return the tokens of each document."""
    return np.concatenate([np.diff(prefix.offsets) for prefix in prefixes])


def weights(near_copies: Counts, trust: Trust | None) -> Floats:
    """Return how much each document should count: 1 / near copies, and 0 for junk."""
    weight = (1 / near_copies).astype(np.float32)
    if trust is not None:
        weight[trust.junk] = 0
    return weight
