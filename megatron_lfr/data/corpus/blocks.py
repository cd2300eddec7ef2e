"""Blocks: what a run trains on, numbered across the prefixes of a corpus.

Within a prefix, tokens lie contiguously in document order, so block i of a range that starts at token t is simply
the tokens [t + i·S, t + (i+1)·S], both ends included: S inputs and their S next tokens. No index is needed, and the
memory does not grow with the number of blocks or documents. In a prefix with a loss mask, only those count as blocks
that have a next token which is trained on: these are numbered, 8 bytes each where any is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.indexed import IndexedDataset, files_of, with_suffix
from megatron_lfr.data.corpus.sidecar import read_sidecar
from megatron_lfr.fileio import hash_samples

PADDING = -1
"""The id of a row that holds no block."""

_SUFFIX = "_text_document"
_SEPARATORS = "_-./"
_MASK_TOKENS = 1 << 22
"""How much of a mask is read at a time."""


@dataclass(frozen=True)
class _Range:
    """The documents of one prefix that belong to a source."""

    dataset: IndexedDataset
    first_document: int
    last_document: int
    """The number after that of the last document."""

    @property
    def first_token(self) -> int:
        return self.dataset.document_offset(self.first_document)

    @property
    def num_tokens(self) -> int:
        return self.dataset.document_offset(self.last_document) - self.first_token

    def trained_blocks(self, seq_length: int) -> npt.NDArray[np.int64]:
        """Return the first token of each of the range's blocks that is trained on, by the dataset's mask, counted in
        blocks from the range's first token."""
        count, mask = max(self.num_tokens - 1, 0) // seq_length, self.dataset.mask
        assert mask is not None
        step, kept = max(1, _MASK_TOKENS // seq_length), []
        for first in range(0, count, step):
            blocks = min(step, count - first)
            labels = np.array([self.first_token + 1 + first * seq_length], np.int64)
            counts = mask.read(labels, blocks * seq_length).reshape(blocks, seq_length).any(axis=1)
            kept.append(first + np.flatnonzero(counts))
        return np.concatenate(kept) if kept else np.empty(0, np.int64)


class BlockSource:
    """One split of a corpus as numbered blocks of `seq_length` + 1 tokens.

    num_blocks: total number of blocks. domains: the names of the prefixes. domain_starts [len(domains) + 1]: prefix d
    holds the blocks from `domain_starts[d]` to before `domain_starts[d + 1]`. left_out [len(domains)]: how many
    stretches of seq_length tokens are no blocks, since nothing in them is trained on.
    """

    def __init__(self, ranges: Sequence[_Range], domains: Sequence[str], seq_length: int) -> None:
        self.seq_length = seq_length
        self.domains = list(domains)
        self._ranges = list(ranges)
        self._first_token = np.array([part.first_token for part in ranges], np.int64)
        counts = [max(part.num_tokens - 1, 0) // seq_length for part in ranges]
        self._numbers: dict[int, npt.NDArray[np.int64]] = {}
        self.left_out = [0] * len(counts)
        for d, part in enumerate(ranges):
            if part.dataset.mask is None:
                continue
            numbers = part.trained_blocks(seq_length)
            self.left_out[d], counts[d] = counts[d] - len(numbers), len(numbers)
            if self.left_out[d]:
                self._numbers[d] = numbers
        self.domain_starts: npt.NDArray[np.int64] = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self.num_blocks = int(self.domain_starts[-1])

    def domain_of(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the index in `domains` of each block."""
        return self._domain_of(self._checked(ids, smallest=0))

    def read(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Read the tokens of blocks `ids` [n], int64 [n, seq_length + 1]. Id -1 gives a row of zeros.

        Errors: ValueError for an id that does not exist, and for a negative token; OSError when a file has become
        shorter since it was opened.
        """
        checked = self._checked(ids, smallest=PADDING)
        rows = np.empty((len(checked), self.seq_length + 1), np.int64)
        domain = np.where(checked == PADDING, -1, self._domain_of(checked))
        for d in np.unique(domain):
            members = np.flatnonzero(domain == d)
            if d == -1:
                rows[members] = 0
                continue
            starts = self._starts(int(d), checked[members])
            dataset = self._ranges[d].dataset
            part = dataset.read(starts, rows.shape[1])
            if dataset.dtype.kind == "i" and part.min() < 0:
                block = checked[members[(part < 0).any(axis=1)][0]]
                raise ValueError(f"{dataset.prefix}.bin: block {block} holds the negative token id {part.min()}")
            rows[members] = part
        return rows

    def read_loss_mask(self, ids: npt.ArrayLike) -> npt.NDArray[np.bool_] | None:
        """Read which labels of blocks `ids` [n] are trained on: [n, seq_length], False in the rows of id -1; None where
        no prefix has a mask, so that all of them are. Errors as of `read`."""
        if all(part.dataset.mask is None for part in self._ranges):
            return None
        checked = self._checked(ids, smallest=PADDING)
        rows = np.zeros((len(checked), self.seq_length), np.bool_)
        domain = np.where(checked == PADDING, -1, self._domain_of(checked))
        for d in np.unique(domain[domain >= 0]):
            members, mask = np.flatnonzero(domain == d), self._ranges[d].dataset.mask
            labels = self._starts(int(d), checked[members]) + 1
            rows[members] = True if mask is None else mask.read(labels, self.seq_length) == 1
        return rows

    def token_starts(self, domain: int) -> npt.NDArray[np.int64]:
        """Return the position, within its prefix's file, of the first token of each block of a domain."""
        first, last = self.domain_starts[domain : domain + 2]
        return self._starts(domain, np.arange(first, last))

    def documents_of(self, block_id: int) -> list[int]:
        """Return the documents to which tokens of the block belong, by their numbers within its prefix."""
        domain = int(self.domain_of([block_id])[0])
        part = self._ranges[domain]
        first = int(self._starts(domain, np.array([block_id], np.int64))[0])
        offset = part.dataset.document_offset
        document = _last_at_or_before(part, first)
        documents = []
        while document < part.last_document and offset(document) <= first + self.seq_length:
            if offset(document) < offset(document + 1):
                documents.append(document)
            document += 1
        return documents

    def _starts(self, domain: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the position of the first token of blocks `ids` [n] of a domain."""
        numbers = ids - self.domain_starts[domain]
        if domain in self._numbers:
            numbers = self._numbers[domain][numbers]
        starts: npt.NDArray[np.int64] = self._first_token[domain] + numbers * self.seq_length
        return starts

    def _domain_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return (np.searchsorted(self.domain_starts, ids, side="right") - 1).astype(np.int64)

    def _checked(self, ids: npt.ArrayLike, smallest: int) -> npt.NDArray[np.int64]:
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"block ids must be integers in one dimension, not {array.dtype} {list(array.shape)}")
        if array.size and (int(array.min()) < smallest or int(array.max()) >= self.num_blocks):
            bad = int(array.min()) if array.min() < smallest else int(array.max())
            raise ValueError(f"block id {bad}: ids go from {smallest} to {self.num_blocks - 1}")
        return array.astype(np.int64, copy=False)


class BlockDataset:
    """A corpus: prefixes, cut into training, validation and test documents, and these into blocks.

    The documents of each prefix are divided in their order, as by Megatron's --split: first those for training, then
    those for validation, then those for testing. A block never crosses the end of a prefix or of a split.

    flag: what the prefixes were given as, for messages. named: numbers of prefixes, ascending: the first `named[0]`
    prefixes have the names of domains that they have alone, and so on.

    Errors: ValueError for a bad split, a sequence length below 1, prefixes given twice, a damaged file, and a prefix
    whose training documents do not fill a block; FileNotFoundError for a missing file.
    """

    def __init__(
        self,
        prefixes: Sequence[str | Path],
        seq_length: int,
        split: str = "99,1,0",
        flag: str = "--data-path",
        named: Sequence[int] = (),
    ) -> None:
        if not prefixes:
            raise ValueError(f"{flag}: give at least one prefix of a preprocessed corpus")
        if seq_length < 1:
            raise ValueError(f"--seq-length {seq_length}: must be at least 1")
        self.seq_length = seq_length
        self.split = parse_split(split)
        paths = [Path(prefix) for prefix in prefixes]
        domains = keep_names(paths, named, flag)
        datasets = [_open(path, flag) for path in paths]
        parts: list[list[_Range]] = [[], [], []]
        for dataset in datasets:
            bounds = split_documents(dataset.num_documents, self.split)
            for part, first, last in zip(parts, bounds, bounds[1:], strict=False):
                part.append(_Range(dataset, first, last))
        for train in parts[0]:
            if train.num_tokens < seq_length + 1:
                raise ValueError(
                    f"{flag} {train.dataset.prefix}: its {train.last_document} training documents (--split "
                    f"{split}) hold {train.num_tokens} tokens, fewer than the {seq_length + 1} that a block of "
                    f"--seq-length {seq_length} needs"
                )
        self.train, self.valid, self.test = (BlockSource(part, domains, seq_length) for part in parts)
        for dataset, blocks in zip(datasets, np.diff(self.train.domain_starts), strict=True):
            if not blocks:
                raise ValueError(f"{flag} {dataset.prefix}: its loss mask leaves no token to train on")
        self.datasets = datasets

    def digests(self) -> list[str]:
        """Return a SHA-256 (hex) for each prefix, over all that gives its block ids their meaning.

        It covers the sequence length, the split, and the type, counts and content of the prefix. From each file, the
        size and up to 64 evenly spaced pages of 4 KiB are read, the first and the last included: an edit between them
        that keeps the size goes unnoticed. A loss mask is read completely. The paths of the files do not matter.
        """
        return [digest_blocks(dataset, self.seq_length, self.split) for dataset in self.datasets]

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the digests of all prefixes, in order."""
        return hashlib.sha256("\n".join(self.digests()).encode()).hexdigest()


def open_prefixes(prefixes: Sequence[str | Path], flag: str = "--data-path") -> list[IndexedDataset]:
    """Open prefixes for their documents. Errors as of BlockDataset, but that they need not fill a block."""
    paths = [Path(prefix) for prefix in prefixes]
    if paths:
        keep_names(paths, (), flag)
    return [_open(path, flag) for path in paths]


def digest_blocks(dataset: IndexedDataset, seq_length: int, split: Sequence[Fraction]) -> str:
    """Return the digest of a prefix; see `BlockDataset.digests`."""
    digest = hashlib.sha256()
    digest.update(f"blocks 1 {seq_length} {','.join(map(str, split))}\n".encode())
    counts = f"{dataset.index.num_sequences} {dataset.num_documents} {dataset.num_tokens}"
    digest.update(f"{dataset.dtype.name} {counts}\n".encode())
    for suffix in (".idx", ".bin"):
        hash_samples(digest, with_suffix(dataset.prefix, suffix))
    if dataset.mask is not None:
        digest.update(f"mask {dataset.mask.sha256()}\n".encode())
    return digest.hexdigest()


def _open(prefix: Path, flag: str) -> IndexedDataset:
    try:
        dataset = IndexedDataset(prefix)
    except FileNotFoundError as error:
        where = "" if prefix.is_absolute() else f", looked for from {Path.cwd()}"
        raise FileNotFoundError(f"{flag} {prefix}: {error}{where}") from None
    read_sidecar(dataset)  # which says whether a loss mask is missing
    return dataset


def parse_split(split: str) -> tuple[Fraction, Fraction, Fraction]:
    """Return the shares of training, validation and test that Megatron's --split names; they sum to 1."""
    words = split.replace(",", " ").split()
    try:
        weights = [Fraction(word) for word in words]
    except (ValueError, ZeroDivisionError):
        weights = []
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or weights[0] == 0:
        raise ValueError(
            f"--split {split}: give one to three weights, none negative, the first (training) not zero, as in 99,1,0"
        )
    train, valid, test = [*weights, Fraction(0), Fraction(0)][:3]
    total = train + valid + test
    return train / total, valid / total, test / total


def split_documents(num_documents: int, shares: Sequence[Fraction]) -> list[int]:
    """Return the first document of each split, and the end of the last, rounding summed shares as Megatron does."""
    return [round(sum(shares[:i], Fraction(0)) * num_documents) for i in range(len(shares) + 1)]


def keep_names(prefixes: Sequence[Path], named: Sequence[int], flag: str = "--data-path") -> list[str]:
    """Return a name for each prefix, as `domain_names` does, where the first `named[0]` prefixes have the names that
    they have alone, the first `named[1]` those that they have then, and so on. A new name that is taken becomes the
    path."""
    names: list[str] = []
    for count in (*named, len(prefixes)):
        new = domain_names(prefixes[:count], flag)[len(names) :]
        paths = map(str, prefixes[len(names) : count])
        names += [path if name in names else name for name, path in zip(new, paths, strict=True)]
    return names


def domain_names(prefixes: Sequence[Path], flag: str = "--data-path") -> list[str]:
    """Return a name for each prefix: the last part of its path, without `_text_document` and the common beginning.

    Where last parts are equal, the folders above them are added. ValueError when a prefix is given twice.
    """
    resolved = [prefix.resolve() for prefix in prefixes]
    seen: set[Hashable] = set()
    for prefix in prefixes:
        files = files_of(prefix)
        if files in seen:
            raise ValueError(f"{flag} {prefix}: given twice")
        seen.add(files)
    for depth in range(1, 1 + max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]).removesuffix(_SUFFIX) for path in resolved]
        if len(set(names)) == len(names):
            break
    else:
        raise ValueError(f"{flag}: these prefixes cannot be told apart: {', '.join(map(str, prefixes))}")
    if len(names) == 1:
        return names
    first, last = min(names), max(names)  # a common beginning of these two is one of all names
    shared = next((i for i, letter in enumerate(first) if letter != last[i]), len(first))
    cut = 1 + max(first.rfind(separator, 0, shared) for separator in _SEPARATORS)
    return [name[cut:] for name in names] if all(len(name) > cut for name in names) else names


def _last_at_or_before(part: _Range, token: int) -> int:
    """Return the last document of the range that starts at or before `token`."""
    low, high = part.first_document, part.last_document
    while high - low > 1:
        middle = (low + high) // 2
        if part.dataset.document_offset(middle) <= token:
            low = middle
        else:
            high = middle
    return low
