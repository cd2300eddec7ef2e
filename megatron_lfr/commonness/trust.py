"""Compares a corpus with trusted text: how much more likely a text is by it than by chance, and what is junk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_lfr.commonness.items import Int64s, Prefix
from megatron_lfr.commonness.likelihood import Floats, Likelihoods, count_ngrams, score

LEAST_TRUSTED = 0.01
"""The share of the trusted text's own tokens whose ratio is as low as junk's. Ours."""


@dataclass(frozen=True)
class Trust:
    """The corpus by the trusted text: mean log-likelihoods, and ratios of documents and blocks, in nats a token.

    junk_below: the ratio below which a document is junk.
    """

    likelihoods: Likelihoods
    documents: Floats
    blocks: Floats
    junk_below: float


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
    log2 of the table's counters, vocabulary, threads. junk_share: the share of the corpus' tokens to take for junk, or
    auto: documents whose ratio is lower than that of 99 % of the trusted text, each part of it scored without itself.
    """
    log2_slots, vocab_size, threads = size
    model = count_ngrams(trusted, log2_slots, vocab_size, threads)
    likely = score(model, corpus, False, threads)
    ratio = likely.documents - by_corpus.documents_unigram
    if junk_share == "auto":
        of_trusted = score(model, trusted, True, threads).documents - trusted_by_corpus.documents_unigram
        junk_below = token_quantile(of_trusted, lengths_of(trusted), LEAST_TRUSTED)
    else:
        junk_below = token_quantile(ratio, lengths_of(corpus), junk_share)
    return Trust(likely, ratio, likely.blocks - by_corpus.blocks_unigram, junk_below)


def lengths_of(prefixes: Sequence[Prefix]) -> Int64s:
    """Return the tokens of each document."""
    return np.concatenate([np.diff(prefix.offsets) for prefix in prefixes])


def token_quantile(ratio: Floats, lengths: Int64s, share: float) -> float:
    """Return the ratio below which documents have at most `share` of all tokens. 0 <= share < 1."""
    order = np.argsort(ratio, kind="stable")  # what has no tokens has no ratio, and comes last
    running = np.cumsum(lengths[order])
    return float(ratio[order[np.searchsorted(running, share * running[-1], side="right")]])


def weights(near_copies: npt.NDArray[np.uint32], trust: Trust | None) -> Floats:
    """Return how much each document should count: 1 / near copies, and 0 for junk."""
    weight = (1 / near_copies).astype(np.float32)
    if trust is not None:
        weight[trust.documents < trust.junk_below] = 0
    return weight
