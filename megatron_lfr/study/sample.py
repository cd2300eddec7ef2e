"""Takes a sample of a corpus in which copies stay together, and holds documents out."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lfr.commonness.clean import write_documents
from megatron_lfr.commonness.command import CommonnessConfig, run
from megatron_lfr.commonness.items import reference_prefixes
from megatron_lfr.commonness.trust import lengths_of
from megatron_lfr.data.corpus.blocks import open_prefixes

HELD_OUT_SHARE, HELD_OUT_TOKENS = 0.1, 200_000
"""Of the text that is held out from: at most this share, and no more tokens than that."""
SEED = 1234
ALL = "1"
"""The split of which all documents are for training."""
Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """Prefixes of the sample, of what is held out, and of the trusted text that is left; tokens: of the sample."""

    data_path: list[str]
    held_out: list[str]
    trusted: list[str]
    tokens: int


def make_sample(look: CommonnessConfig, trusted_path: Sequence[str], tokens: int, folder: Path) -> Sample:
    """Write `folder`/sample, held_out and, with trusted text, trusted; what an earlier attempt left is replaced.

    look: how the copies of the corpus are found. The sample has some `tokens` tokens: clusters of near copies in random
    order, each complete, over all prefixes. What is held out is of the trusted text, whose other documents tell junk
    from text; without it, of the corpus, of each cluster one document. A prefix of which less than a block is sampled
    or held out is not there. ValueError where too little is left; of the trusted text before the corpus is read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    least = look.seq_length + 1
    left, apart = _part_trusted(_Text(trusted_path), folder, least) if trusted_path else ({}, {})
    run(look)
    cluster = np.load(look.output / "document_representative.npy", allow_pickle=False).astype(np.int64)
    corpus, near = _Text(look.data_path), None
    if not trusted_path:
        near = first_clusters(cluster, corpus.lengths, corpus.held_out_tokens)
        apart = corpus.write(near & (cluster == np.arange(len(cluster))), folder / "held_out", least)
    sampled = first_clusters(cluster, corpus.lengths, tokens, without=near)
    sample = corpus.write(sampled, folder / "sample", least)
    if not sample or not apart:
        raise ValueError("--data-path: too small for a sample and documents to hold out")
    return Sample(list(sample), list(apart), list(left), sum(sample.values()))


def _part_trusted(trusted: _Text, folder: Path, least: int) -> tuple[dict[str, int], dict[str, int]]:
    """Write what trusted text tells junk by, and what is held out of it; return the tokens of the prefixes of each."""
    held_out = first_clusters(np.arange(len(trusted.lengths)), trusted.lengths, trusted.held_out_tokens)
    left = trusted.write(~held_out, folder / "trusted")
    apart = trusted.write(held_out, folder / "held_out", least)
    if not left or not apart:
        raise ValueError(
            f"--reference-data-path: too small ({trusted.lengths.sum():,} tokens in {len(trusted.lengths)} documents): "
            f"a tenth of it is held out, and must hold a block of {least - 1} tokens, and the rest tells junk from text"
        )
    return left, apart


def first_clusters(cluster: Int64s, lengths: Int64s, tokens: int, without: Bools | None = None) -> Bools:
    """Return which documents are in the clusters that come first in a random order, until they hold `tokens` tokens.

    cluster [documents]: the number of each one's cluster. lengths: in tokens. without: documents whose clusters are
    left out. The order is the same each time.
    """
    order = np.random.default_rng(SEED).permutation(len(cluster))[cluster]  # by the place of the cluster's number
    if without is not None:
        order = np.where(without, len(cluster), order)
    sizes = np.bincount(order, lengths, minlength=len(cluster) + 1)[: len(cluster)]
    before = np.cumsum(sizes) - sizes
    taken = np.append(before < tokens, False)
    chosen: Bools = taken[order]
    return chosen


class _Text:
    """The documents of some prefixes, and their lengths in tokens."""

    def __init__(self, data_path: Sequence[str]) -> None:
        self.data_path = list(data_path)
        datasets = open_prefixes(self.data_path)
        self._starts = np.cumsum([0, *(dataset.num_documents for dataset in datasets)])
        self.lengths: Int64s = lengths_of(reference_prefixes(datasets)) if datasets else np.zeros(0, np.int64)

    @property
    def held_out_tokens(self) -> int:
        return int(min(HELD_OUT_SHARE * self.lengths.sum(), HELD_OUT_TOKENS))

    def write(self, chosen: Bools, folder: Path, least_tokens: int = 1) -> dict[str, int]:
        """Write the chosen documents, and return the tokens of each prefix that has so many."""
        shutil.rmtree(folder, ignore_errors=True)
        parts = [np.flatnonzero(chosen[first:last]) for first, last in itertools.pairwise(self._starts.tolist())]
        return write_documents(self.data_path, parts, folder, least_tokens)
