"""Makes the page: shares by domain, distributions, and the documents at both ends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_lfr.commonness.copies import Copies, Counts
from megatron_lfr.commonness.items import Prefix
from megatron_lfr.commonness.likelihood import Floats
from megatron_lfr.commonness.results import Items
from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.output import number
from megatron_lfr.report.bars import Bar, ridges, stacked_bars
from megatron_lfr.report.document import document
from megatron_lfr.report.frame import colour, figure, legend
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.scale import Doubles, percent, si
from megatron_lfr.report.tables import table

_MOST_DOMAINS = 24
_ROWS = 20
_TEXT_TOKENS = 96
_TEXT_LETTERS = 300
_BINS = 100
_TAIL = 0.001

_PARTS = ((colour(0), "unique"), (colour(1), "near copies"), (colour(3), "exact copies"))


def make_page(
    domains: Sequence[str], prefixes: Sequence[Prefix], documents: Items, blocks: Items, tokenizer: Tokenizer | None
) -> str:
    """Return the results as one HTML file that needs nothing else. tokenizer: None shows token ids in place of text."""
    sections = [
        (
            "shares",
            "Shares by domain",
            join([_shares(domains, items, kind) for kind, items in _kinds(documents, blocks)]),
        ),
        ("copies", "How often items are copied", _copy_counts(documents, blocks)),
        ("likelihoods", "How likely documents and blocks are", _distributions(domains, documents, blocks)),
        ("extremes", "Documents at the ends", _Extremes(domains, prefixes, documents, tokenizer).section()),
    ]
    links = [element("a", name, href=f"#{key}") for key, name, _ in sections]
    body = join(
        [
            element("header", element("p", "Learn-Focus-Review"), element("h1", "Commonness"), class_="top"),
            element("nav", *links, aria_label="Sections"),
            element("main", *(element("section", element("h2", name), part, id=key) for key, name, part in sections)),
            element("div", id="tip", role="status", hidden=""),
        ]
    )
    return document("Commonness of a corpus", body)


def _kinds(documents: Items, blocks: Items) -> list[tuple[str, Items]]:
    return [("documents", documents), ("blocks", blocks)]


def _slices(items: Items, domains: Sequence[str]) -> list[tuple[str, slice]]:
    """Return all items, then those of each domain, the largest first, as many as fit."""
    starts = items.starts.tolist()
    each = [(name, slice(a, b)) for name, a, b in zip(domains, starts, starts[1:], strict=False)]
    each.sort(key=lambda pair: pair[1].start - pair[1].stop)
    every = ("all", slice(0, starts[-1]))
    return [every, *each[:_MOST_DOMAINS]] if len(each) > 1 else [every]


def _shares(domains: Sequence[str], items: Items, kind: str) -> Html:
    rows = [(name, items.token_shares(members)) for name, members in _slices(items, domains)]
    plot = stacked_bars([Bar(name, parts) for name, parts in rows], _PARTS, f"Copies among {kind}")
    head: list[Content] = ["", *(name for _, name in _PARTS), "tokens"]
    cells: list[list[Content]] = [
        [name, *(percent(part / (sum(parts) or 1), 2) for part in parts), si(sum(parts))] for name, parts in rows
    ]
    note = "Shares of tokens. Of n copies, each counts as 1/n unique, and as a copy for the rest."
    if items.junk is not None:
        head.append("taken for junk")
        for row, (_, members) in zip(cells, _slices(items, domains), strict=True):
            share = items.junk_share(members)
            row.append("" if share is None else percent(share, 2))
        note += " What is taken for junk has the weight 0, copies of it too, and is not in a cleaned corpus."
    return figure(f"Copies among {kind}", join([legend(_PARTS), plot]), note, table(head, cells))


def _copy_counts(documents: Items, blocks: Items) -> Html:
    arrays = [
        counts for _, items in _kinds(documents, blocks) for counts in (items.copies.copies, items.copies.near_copies)
    ]
    most = max((int(counts.max()) for counts in arrays if len(counts)), default=1)
    edges = [1, 2, *(2**power + 1 for power in range(1, most.bit_length() + 1))]
    rows: list[list[Content]] = []
    for low, high in itertools.pairwise(edges):
        if low <= most:
            name = str(low) if high == low + 1 else f"{low:,} to {high - 1:,}"
            rows.append([name, *(f"{int(((counts >= low) & (counts < high)).sum()):,}" for counts in arrays)])
    head = ["copies, itself among them", "documents, exact", "documents, near", "blocks, exact", "blocks, near"]
    return table(head, rows)


def _distributions(domains: Sequence[str], documents: Items, blocks: Items) -> Html:
    parts: list[Content] = []
    for kind, items in _kinds(documents, blocks):
        for values, title, note in _measures(items):
            rows = [(name, values[members]) for name, members in _slices(items, domains)]
            plot = _ridges(rows, f"{title} of {kind}")
            if plot is not None:
                parts.append(figure(f"{title} of {kind}", plot, note))
    return join(parts) if parts else element("p", "No document holds a token.", class_="note")


def _measures(items: Items) -> list[tuple[Floats, str, str]]:
    measures = [(items.log_likelihood, "Log-likelihood", "Nats a token under the 4-gram model of all other documents.")]
    if items.ratio is not None:
        note = (
            "Log-likelihood under the 4-gram model of trusted text less that under the corpus' unigrams, nats a token. "
            "Low: the words may be common here, their order is not that of trusted text."
        )
        measures.append((items.ratio, "Ratio to trusted text", note))
    if items.beyond is not None:
        note = (
            "Log-likelihood under the 4-gram model of trusted text less what the same tokens usually have in it, nats "
            "a token. Low: they are in no order."
        )
        measures.append((items.beyond, "Order", note))
    return measures


def _ridges(rows: Sequence[tuple[str, Floats]], title: str) -> Html | None:
    finite = [(name, values[np.isfinite(values)].astype(np.float64)) for name, values in rows]
    if not len(finite[0][1]):
        return None
    low, high = np.quantile(finite[0][1], (_TAIL, 1 - _TAIL))
    edges: Doubles = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    drawn = [(name, [np.histogram(np.clip(values, low, high), edges)[0].astype(np.float64)]) for name, values in finite]
    marks = [
        [(float(np.clip(np.median(values), low, high)), f"median {np.median(values):.3f}")] if len(values) else []
        for _, values in finite
    ]
    return ridges(drawn, edges, [colour(0)], marks, title, "nats a token")


def _most_copied(copies: Copies, counts: Counts) -> npt.NDArray[np.int64]:
    """Return the items of which there are most, by falling count: of each cluster of near copies one."""
    order = np.argsort(-counts.astype(np.int64), kind="stable")
    order = order[counts[order] > 1]
    _, first = np.unique(copies.representative[order], return_index=True)
    return order[np.sort(first)]


class _Extremes:
    """Tables of documents, with the beginnings of their texts, which others wrote."""

    def __init__(
        self, domains: Sequence[str], prefixes: Sequence[Prefix], documents: Items, tokenizer: Tokenizer | None
    ) -> None:
        self.domains, self.prefixes, self.documents, self.tokenizer = domains, prefixes, documents, tokenizer

    def section(self) -> Html:
        copies = self.documents.copies
        parts: list[Content] = []
        for name, counts in (("Most copied", copies.copies), ("Most near copies", copies.near_copies)):
            parts += [element("h3", name), self._table(_most_copied(copies, counts))]
        measures = [("Least likely by the corpus itself", self.documents.log_likelihood)]
        if self.documents.ratio is not None:
            measures.append(("Most unlike trusted text", self.documents.ratio))
        if self.documents.beyond is not None:
            measures.append(("Least in the order of trusted text", self.documents.beyond))
        for name, values in measures:
            order = np.argsort(values, kind="stable")
            parts += [element("h3", name), self._table(order[np.isfinite(values[order])])]
        if self.documents.ratio is not None and self.documents.junk is not None:
            junk = np.flatnonzero(self.documents.junk & copies.firsts)
            closest = junk[np.argsort(-self.documents.ratio[junk], kind="stable")]
            parts += [element("h3", "Taken for junk, the most like trusted text"), self._table(closest)]
        return join(parts)

    def _table(self, ids: npt.NDArray[np.int64]) -> Html:
        if not len(ids):
            return element("p", "None.", class_="note")
        head: list[Content] = ["document", "domain", "tokens", "exact", "near", "nats a token", "ratio", "begins"]
        return table(head, [self._row(int(i)) for i in ids[:_ROWS]], "prose")

    def _row(self, i: int) -> list[Content]:
        items = self.documents
        domain = int(np.searchsorted(items.starts, i, side="right")) - 1
        ratio = None if items.ratio is None else float(items.ratio[i])
        return [
            i - int(items.starts[domain]),
            self.domains[domain],
            f"{int(items.lengths[i]):,}",
            int(items.copies.copies[i]),
            int(items.copies.near_copies[i]),
            number(float(items.log_likelihood[i]), 3),
            number(ratio, 3),
            self._text(domain, i - int(items.starts[domain])),
        ]

    def _text(self, domain: int, number_: int) -> str:
        prefix = self.prefixes[domain]
        first, last = prefix.offsets[number_ : number_ + 2].tolist()
        tokens = prefix.dataset.read(np.array([first], np.int64), min(last - first, _TEXT_TOKENS))[0].tolist()
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return self.tokenizer.decode(tokens)[:_TEXT_LETTERS]
