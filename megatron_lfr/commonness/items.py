"""Describes documents, sections of documents, and blocks of a corpus as spans of its token files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.data.corpus.blocks import BlockDataset, digest_blocks, parse_split, split_documents
from megatron_lfr.data.corpus.indexed import IndexedDataset

Int64s = npt.NDArray[np.int64]

SECTION = 1 << 15
"""Tokens of a document that are scored together, without their own counts: a longer one is cut into so many."""

_DOCUMENTS_READ = 1 << 16
_BATCH_TOKENS = 1 << 22
_BATCH_SPANS = 1 << 14


@dataclass(frozen=True)
class Spans:
    """Spans of one file: `starts` and `lengths` [n], in tokens."""

    dataset: IndexedDataset
    starts: Int64s
    lengths: Int64s

    def batches(self, tokens: int = _BATCH_TOKENS) -> Iterator[Spans]:
        """Yield the same spans in parts of some `tokens`, which depend on nothing else."""
        bounds = np.concatenate(([0], np.cumsum(self.lengths)))
        first = 0
        while first < len(self.starts):
            last = int(np.searchsorted(bounds, bounds[first] + tokens, side="left"))
            last = min(max(last, first + 1), first + _BATCH_SPANS, len(self.starts))
            yield Spans(self.dataset, self.starts[first:last], self.lengths[first:last])
            first = last

    def arguments(self) -> tuple[_C.TokenFile, int, Int64s, Int64s]:
        """Return the spans as the C++ core takes them: file, its dtype, starts and lengths."""
        return self.dataset.token_file, self.dataset.index.dtype_code, self.starts, self.lengths


@dataclass(frozen=True)
class Prefix:
    """The first documents of an indexed dataset, and the blocks that are cut from them.

    offsets [documents + 1]: where each document begins, and the end of the last. blocks: of `seq_length` tokens and the
    token behind, each from where the one before has its last; 0 of a corpus that is not trained on.
    """

    dataset: IndexedDataset
    offsets: Int64s
    blocks: int = 0
    seq_length: int = 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1] - self.offsets[0])

    def documents(self) -> Spans:
        return Spans(self.dataset, self.offsets[:-1], np.diff(self.offsets))

    @cached_property
    def block_edges(self) -> Int64s:
        """Return where the labels of each block begin, and the end of the last's [blocks + 1]."""
        edges: Int64s = self.offsets[0] + 1 + self.seq_length * np.arange(self.blocks + 1, dtype=np.int64)
        return edges

    def training_blocks(self) -> Spans:
        return Spans(self.dataset, self.block_edges[:-1] - 1, np.full(self.blocks, self.seq_length + 1, np.int64))

    def sections(self) -> Spans:
        """Return the documents, those beyond SECTION tokens cut; together they are all tokens, in their order."""
        lengths = np.diff(self.offsets)
        counts = -(-lengths // SECTION)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(self.offsets[:-1], counts) + SECTION * number
        ends = np.minimum(starts + SECTION, np.repeat(self.offsets[1:], counts))
        return Spans(self.dataset, starts, ends - starts)


def training_prefixes(corpus: BlockDataset) -> list[Prefix]:
    """Return the training documents of each prefix of a corpus, and their blocks. ValueError where a loss mask leaves
    out some of these, so that they do not lie end to end."""
    for dataset, left_out in zip(corpus.datasets, corpus.train.left_out, strict=True):
        if left_out:
            raise ValueError(
                f"--data-path {dataset.prefix}: its loss mask leaves out {left_out} blocks, in which nothing is "
                "trained on; commonness needs all of them: give a longer --seq-length, or remove the longest prompts"
            )
    counts = np.diff(corpus.train.domain_starts)
    documents = [split_documents(dataset.num_documents, corpus.split)[1] for dataset in corpus.datasets]
    return [
        Prefix(dataset, _offsets(dataset, last), int(blocks), corpus.seq_length)
        for dataset, last, blocks in zip(corpus.datasets, documents, counts, strict=True)
    ]


def reference_prefixes(datasets: Sequence[IndexedDataset]) -> list[Prefix]:
    """Return all documents of each dataset, and no blocks."""
    return [Prefix(dataset, _offsets(dataset, dataset.num_documents)) for dataset in datasets]


def reference_digests(datasets: Sequence[IndexedDataset]) -> list[str]:
    """Return a SHA-256 (hex) of each dataset, all of whose documents count."""
    return [digest_blocks(dataset, 1, parse_split("1")) for dataset in datasets]


def _offsets(dataset: IndexedDataset, documents: int) -> Int64s:
    """Return where the first documents begin, and the end of the last [documents + 1]."""
    offsets = np.zeros(documents + 1, np.int64)
    sequence = first = 0
    for counts in dataset.sequences_of_documents(_DOCUMENTS_READ):
        counts = counts[: documents - first]
        lengths = dataset.index.sequence_lengths(sequence, sequence + int(counts.sum()))
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        offsets[first + 1 : first + 1 + len(counts)] = offsets[first] + ends[np.cumsum(counts)]
        sequence, first = sequence + len(lengths), first + len(counts)
        if first == documents:
            break
    return offsets
