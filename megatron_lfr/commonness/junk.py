"""Finds which documents of a corpus are junk, and how many of them there are, by the spread of trusted text (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lfr.commonness.items import Int64s, Prefix
from megatron_lfr.commonness.likelihood import Doubles, Floats
from megatron_lfr.commonness.order import Mask, in_order

RULE = 4
"""Number of the rule for junk: 1, the ratio and a comparison of orders, long documents counting in full; 2, at most
MOST_TOKENS of them; 3, less what repeats itself; 4, less what shows an order of its own. A change of which documents
are junk raises it: results say it, and a study prepares corpora of two rules in folders of their own."""
MOST_TRUSTED = 0.15
"""Most of the trusted text's own tokens that may be in as little order as what is taken for junk. Ours."""
DEVIATIONS = 3.0
"""An excess over the trusted text has to be more than so many standard deviations of what chance makes it. Ours: with
fewer, the best of many cuts takes some of a text that is like the trusted one."""
LEAST_DOCUMENTS = 100
"""Fewest documents, as `effective_number` counts them, whose spread tells what is in less order than trusted text.
Ours: with 50, documents of kinds that a few trusted ones happen to lack were taken for junk."""
MOST_TOKENS = 1000
"""Tokens of a document that count there. Ours: a longer one says hardly more of how much order its kind of text has."""


@dataclass(frozen=True)
class Ordered:
    """Documents of a text. beyond: how much likelier their tokens are than usual, nats a token. counted: as how many
    tokens each counts."""

    prefixes: Sequence[Prefix]
    beyond: Floats
    counted: Doubles


def counted(lengths: Int64s) -> Doubles:
    """Return as how many tokens documents count: MOST_TOKENS at most."""
    return np.minimum(lengths, MOST_TOKENS).astype(np.float64)


def find_junk(corpus: Ordered, low: Mask, trusted: Ordered) -> tuple[Mask, float | None]:
    """Return which documents are junk, of low ratio or of less order than trusted ones, and below which order.

    The ratio finds random characters, and the order by trusted text finds words in no order. Neither is right on a kind
    of text that the trusted text lacks, whose documents show that they are in an order themselves. Where the trusted
    text is too small for the comparison of orders, the ratio decides alone.
    """
    if effective_number(trusted.counted) < LEAST_DOCUMENTS:
        return low & ~in_order(corpus.prefixes, low), None
    limit = token_quantile(trusted.beyond, trusted.counted, MOST_TRUSTED)
    ordered = in_order(corpus.prefixes, low | (corpus.beyond < limit))
    beyond = _disorder(corpus.beyond, limit, ordered)
    of_trusted = _disorder(trusted.beyond, limit, in_order(trusted.prefixes, trusted.beyond < limit))
    share = excess(beyond, corpus.counted, of_trusted, trusted.counted)
    beyond_below = min(limit, token_quantile(beyond, corpus.counted, share))
    return (low & ~ordered) | (beyond < beyond_below), beyond_below


def _disorder(beyond: Floats, limit: float, ordered: Mask) -> Floats:
    """Return the values below the limit of documents that are in no order of their own, and infinity for all others."""
    return np.where((beyond < limit) & ~ordered, beyond, np.float32(np.inf))


def token_quantile(ratio: Floats, lengths: Int64s | Doubles, share: float) -> float:
    """Return the value below which documents have at most `share` of all tokens. 0 <= share < 1."""
    order = np.argsort(ratio, kind="stable")  # what has no tokens has no ratio, and comes last
    running = np.cumsum(lengths[order])
    return float(ratio[order[np.searchsorted(running, share * running[-1], side="right")]])


def effective_number(lengths: Doubles) -> float:
    """Return how many documents of one length would have a mean over tokens that is as well known (Kish 1965): fewer
    than there are where some hold most of the tokens."""
    squares = float((lengths**2).sum())
    return float(lengths.sum()) ** 2 / squares if squares else 0.0


def excess(values: Floats, lengths: Doubles, trusted: Floats, trusted_lengths: Doubles) -> float:
    """Return the share of the tokens that can only be of documents which the trusted text has none of: it is
    (F - T) / (1 - T), where F and T are the shares of both that lie below a value (Blanchard, Lee & Scott 2010,
    Semi-supervised novelty detection).

    It is the largest one for values below which there is at most MOST_TRUSTED of the trusted text, and where F - T is
    more than DEVIATIONS standard deviations that it would have, were both texts alike (ours); 0 where that is nowhere.
    """
    ours, theirs = (np.flatnonzero(lengths), np.flatnonzero(trusted_lengths))
    at = np.sort(values[ours])
    below, trusted_below = _below(values[ours], lengths[ours], at), _below(trusted[theirs], trusted_lengths[theirs], at)
    variance = sum(trusted_below * (1 - trusted_below) / effective_number(text) for text in (lengths, trusted_lengths))
    legal = (trusted_below <= MOST_TRUSTED) & (below - trusted_below > DEVIATIONS * np.sqrt(variance))
    below, trusted_below = below[legal], trusted_below[legal]
    return float(((below - trusted_below) / (1 - trusted_below)).max(initial=0.0))


def _below(values: Floats, lengths: Doubles, at: Floats) -> Doubles:
    """Return the share of the tokens that is in documents below each value."""
    order = np.argsort(values, kind="stable")
    running = np.concatenate(([0], np.cumsum(lengths[order])))
    shares: Doubles = running[np.searchsorted(values[order], at)] / running[-1]
    return shares
