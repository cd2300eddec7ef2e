"""Holds what is known of a corpus' documents and blocks: arrays, and their summary by domain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.commonness.copies import Copies
from megatron_lfr.commonness.items import Int64s, Prefix
from megatron_lfr.commonness.likelihood import Doubles, Floats
from megatron_lfr.commonness.order import Mask
from megatron_lfr.data.corpus.block_values import describing, description_of

_OF_COPIES = ("copies", "near_copies", "representative")
_OF_ITEMS = ("log_likelihood", "reference_log_likelihood", "ratio", "weight", "unique_share", "beyond")
ARRAYS = (*_OF_COPIES, *_OF_ITEMS)
"""Names of the arrays that are stored: those of `Copies`, and those of `Items`."""
_BY_REFERENCE = ("reference_log_likelihood", "ratio")
_OF_DOCUMENTS = ("beyond",)
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def array_file(kind: str, name: str) -> str:
    """Return the name of the file of an array, of `kind` document or block."""
    return f"{kind}_{name}.npy"


def block_arrays(has_reference: bool) -> list[str]:
    """Return the names of the arrays of blocks that are stored, with and without trusted text."""
    return [name for name in ARRAYS if name not in _OF_DOCUMENTS and (has_reference or name not in _BY_REFERENCE)]


@dataclass(frozen=True)
class Items:
    """Documents or blocks [n], numbered over all prefixes.

    starts [domains + 1]: prefix d has the items from starts[d] to before starts[d + 1]. lengths: tokens of each.
    log_likelihood: nats a token under the corpus' own model. reference_log_likelihood and ratio: None without a
    reference. unique_share, of blocks: the mean over their labels of one over the near copies of the label's document.
    weight: the same, but 0 for what is taken for junk. beyond, of documents: how much likelier their tokens are by the
    trusted text than these usually are in it, nats a token.
    """

    starts: Int64s
    lengths: Int64s
    copies: Copies
    log_likelihood: Floats
    reference_log_likelihood: Floats | None
    ratio: Floats | None
    weight: Floats
    unique_share: Floats | None = None
    beyond: Floats | None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return every array that is stored, under its name."""
        named = {name: getattr(self.copies, name) for name in _OF_COPIES}
        named |= {name: getattr(self, name) for name in _OF_ITEMS}
        return {name: array for name, array in named.items() if array is not None}

    def save(self, folder: Path, kind: str, corpus: list[str] | None = None) -> None:
        """Store the arrays as `<kind>_<name>.npy`, and with the digests of the corpus, whose blocks they are then of, a
        description beside each."""
        for name, array in self.arrays().items():
            path = folder / array_file(kind, name)
            np.save(path, array, allow_pickle=False)
            if corpus is not None:
                describing(path).write_text(description_of(array, corpus, f"commonness: {name}"), encoding="utf-8")

    def token_shares(self, members: slice) -> tuple[float, float, float]:
        """Return (tokens as they would be without copies, near copies, exact copies) of some items.

        Of n copies, each counts as 1/n unique and the rest as a copy: no one of them is the original.
        """
        lengths = self.lengths[members].astype(np.float64)
        unique = float((lengths / self.copies.near_copies[members]).sum())
        without_exact = float((lengths / self.copies.copies[members]).sum())
        total = float(lengths.sum())
        return unique, without_exact - unique, total - without_exact

    @property
    def junk(self) -> Mask | None:
        """Which documents are taken for junk; None without a reference, and of blocks, which may be so in part."""
        return None if self.ratio is None or self.unique_share is not None else self.weight == 0

    def junk_share(self, members: slice) -> float | None:
        """Return the share of the tokens of some documents that is taken for junk, copies of it too; None as `junk`."""
        lengths = self.lengths[members]
        if self.junk is None or not lengths.sum():
            return None
        return float(lengths[self.junk[members]].sum() / lengths.sum())

    def summary(self, members: slice) -> dict[str, Any]:
        """Return counts, shares of tokens, and quantiles of some items, for JSON."""
        unique, near, exact = self.token_shares(members)
        total = unique + near + exact
        parts = self.copies.copies[members], self.copies.near_copies[members]
        figures: dict[str, Any] = {
            "items": len(parts[0]),
            "tokens": int(total),
            "with_exact_copies": int((parts[0] > 1).sum()),
            "with_near_copies": int((parts[1] > 1).sum()),
            "share_unique": unique / total if total else None,
            "share_near_copies": near / total if total else None,
            "share_exact_copies": exact / total if total else None,
        }
        if self.junk is not None:
            figures["share_junk"] = self.junk_share(members)
        for name in _OF_ITEMS:
            values = getattr(self, name)
            if values is not None:
                figures[name] = quantiles(values[members])
        return figures


def quantiles(values: Floats) -> dict[str, float] | None:
    """Return the mean and some quantiles of what is a number; None where nothing is."""
    numbers = values[np.isfinite(values)].astype(np.float64)
    if not len(numbers):
        return None
    at = np.quantile(numbers, _QUANTILES)
    return {
        "mean": float(numbers.mean()),
        **{f"q{100 * q:02.0f}": float(v) for q, v in zip(_QUANTILES, at, strict=True)},
    }


def summarize(items: Items, domains: list[str]) -> dict[str, Any]:
    """Return the summary of all items and of each domain's."""
    starts = items.starts.tolist()
    by_domain = {
        name: items.summary(slice(first, last)) for name, first, last in zip(domains, starts, starts[1:], strict=False)
    }
    return {**items.summary(slice(0, starts[-1])), "domains": by_domain}


def block_means(prefixes: list[Prefix], values: Floats | Doubles, starts: Int64s) -> Floats:
    """Return, for each block, the mean over its labels of what their documents have: values [documents].

    Blocks begin anywhere in a document, so that copies of documents lie in blocks that are no copies of each other.
    """
    means: list[Doubles] = []
    for prefix, first, last in zip(prefixes, starts, starts[1:], strict=False):
        totals = np.diff(prefix.offsets) * values[first:last].astype(np.float64)
        running = np.concatenate(([0.0], np.cumsum(totals)))
        means.append(np.diff(np.interp(prefix.block_edges, prefix.offsets, running)) / prefix.seq_length)
    return np.concatenate(means).astype(np.float32)
