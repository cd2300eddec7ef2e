"""Turns a chunk of input into token ids: the work of a preprocessing worker."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.mask import Mask
from megatron_lfr.data.corpus.tokenizer import Encoded, Tokenizer
from megatron_lfr.data.preprocess.chat import ChatTemplate
from megatron_lfr.data.preprocess.documents import BrokenDocument, Part, parse_document, raw_documents, where
from megatron_lfr.data.preprocess.supervised import Record, RecordKeys, encode_records, parse_record

_NAMED = 10
"""How many broken documents of a chunk are named; the others are only counted."""


@dataclass(frozen=True)
class Group:
    """The documents of one domain in a chunk, in input order."""

    domain: str | None
    first_seen: str
    """Where the chunk first names the domain, as "file:line"."""
    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    skipped: int
    """Number of documents without a token, which are left out."""
    mask: Mask | None = None
    """Which of the tokens are trained on, of supervised records."""


@dataclass(frozen=True)
class EncodedChunk:
    """The token ids of a chunk; domains are in the order in which the chunk first names them."""

    groups: list[Group]
    broken: Counter[str]
    """Number of broken documents that were left out, by kind."""
    named: list[str]
    """The first of these, as "file:line: reason"."""

    @property
    def documents(self) -> int:
        return sum(len(group.lengths) for group in self.groups)

    @property
    def tokens(self) -> int:
        return sum(len(group.tokens) for group in self.groups)


@dataclass
class _Documents:
    first_seen: str
    texts: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class Encoder:
    """Parses and tokenizes chunks."""

    tokenizer: Tokenizer
    json_key: str
    domain_key: str | None
    eod: int | None
    """The id that ends each document."""
    dtype: np.dtype[Any]
    skip_broken: bool
    """Count broken documents instead of stopping at the first."""
    bos: int | None = None
    """The id that starts each document."""
    records: RecordKeys | None = None
    """The keys of supervised records; None where documents are plain text."""

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.eod)

    def without_tokenizer(self) -> Callable[..., Encoder]:
        """Return this encoder without its tokenizer, which workers load for themselves."""
        return functools.partial(
            Encoder,
            json_key=self.json_key,
            domain_key=self.domain_key,
            eod=self.eod,
            dtype=self.dtype,
            skip_broken=self.skip_broken,
            bos=self.bos,
            records=self.records,
        )

    def encode(self, chunk: Sequence[Part]) -> EncodedChunk:
        """Tokenize the documents of a chunk. ValueError "file:line: reason" for the first broken one."""
        by_domain: dict[str | None, _Documents] = {}
        broken: Counter[str] = Counter()
        named: list[str] = []
        for part in chunk:
            for number, raw in raw_documents(part):
                text, record = "", None
                try:
                    if self.records is None:
                        text, domain = parse_document(raw, self.json_key, self.domain_key)
                    else:
                        assert isinstance(raw, bytes)
                        record, domain = parse_record(raw, self.records, self.domain_key, self._chat)
                except BrokenDocument as error:
                    message = f"{where(part, number)}: {error}"
                    if not self.skip_broken:
                        raise ValueError(message) from None
                    broken[error.kind] += 1
                    if len(named) < _NAMED:
                        named.append(message)
                    continue
                if domain not in by_domain:
                    by_domain[domain] = _Documents(where(part, number))
                if record is None:
                    by_domain[domain].texts.append(text)
                else:
                    by_domain[domain].records.append(record)
        return EncodedChunk([self._group(*item) for item in by_domain.items()], broken, named)

    def _group(self, domain: str | None, documents: _Documents) -> Group:
        if self.records is not None:
            encoded = encode_records(documents.records, self.tokenizer, self.dtype, self.bos, self.eod)
            skipped = len(documents.records) - len(encoded.lengths)
            return Group(domain, documents.first_seen, encoded.tokens, encoded.lengths, skipped, encoded.mask)
        tokens, lengths = self.tokenizer.encode_arrays(documents.texts, self.dtype)
        kept = lengths[lengths > 0]
        skipped = len(lengths) - len(kept)
        if self.eod is not None:
            tokens, kept = _framed(tokens, kept, self.eod, at_start=False)
        if self.bos is not None:
            tokens, kept = _framed(tokens, kept, self.bos, at_start=True)
        return Group(domain, documents.first_seen, tokens, kept, skipped)


def _framed(tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int32], mark: int, at_start: bool) -> Encoded:
    """Return the same documents, each with `mark` before or after it."""
    longer = lengths + np.int32(1)
    out = np.full(len(tokens) + len(lengths), mark, tokens.dtype)
    is_text = np.ones(len(out), np.bool_)
    ends = np.cumsum(longer, dtype=np.int64)
    is_text[ends - longer if at_start else ends - 1] = False
    out[is_text] = tokens
    return out, longer
