"""One chunk of input text to token ids: what a preprocessing worker does."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.tokenizer import Tokenizer

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """Bytes of one file: whole lines from number `line` on, or, with `line` None, a text file's whole content."""

    path: Path
    line: int | None
    data: bytes


@dataclass(frozen=True)
class Group:
    """The documents of one domain in a chunk, in input order."""

    domain: str | None
    first_seen: str
    """Where the chunk names the domain first, as "file:line"."""
    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    skipped: int
    """Documents without a token."""


@dataclass(frozen=True)
class EncodedChunk:
    """What a chunk became; domains in the order in which the chunk first names them."""

    bytes_read: int
    groups: list[Group]

    @property
    def documents(self) -> int:
        return sum(len(group.lengths) for group in self.groups)

    @property
    def tokens(self) -> int:
        return sum(len(group.tokens) for group in self.groups)


@dataclass(frozen=True)
class Document:
    text: str
    domain: str | None
    where: str


@dataclass(frozen=True)
class Encoder:
    """Parses and tokenizes chunks."""

    tokenizer: Tokenizer
    json_key: str
    domain_key: str | None
    eod: int | None
    """The id to end each document with."""
    dtype: np.dtype[Any]

    def without_tokenizer(self) -> Callable[..., Encoder]:
        """This encoder but for its tokenizer, which workers load for themselves."""
        return functools.partial(
            Encoder, json_key=self.json_key, domain_key=self.domain_key, eod=self.eod, dtype=self.dtype
        )

    def encode(self, chunk: Sequence[Part]) -> EncodedChunk:
        """Token ids of a chunk's documents. ValueError "file:line: reason" at the first that is broken."""
        documents = [document for part in chunk for document in self._parse(part)]
        encoded = self.tokenizer.encode_batch([document.text for document in documents])
        by_domain: dict[str | None, list[int]] = {}
        for i, document in enumerate(documents):
            by_domain.setdefault(document.domain, []).append(i)
        groups = [self._group(documents[members[0]], [encoded[i] for i in members]) for members in by_domain.values()]
        return EncodedChunk(sum(len(part.data) for part in chunk), groups)

    def _group(self, first: Document, encoded: list[list[int]]) -> Group:
        kept = [ids for ids in encoded if ids]
        if self.eod is not None:
            for ids in kept:
                ids.append(self.eod)
        lengths = np.array([len(ids) for ids in kept], np.int32)
        tokens = np.fromiter(chain.from_iterable(kept), self.dtype, count=int(lengths.sum(dtype=np.int64)))
        return Group(first.domain, first.where, tokens, lengths, len(encoded) - len(kept))

    def _parse(self, part: Part) -> Iterator[Document]:
        if part.line is None:
            yield Document(_decode(part.data.removeprefix(_BOM), str(part.path)), None, str(part.path))
            return
        for offset, line in enumerate(part.data.split(b"\n")):
            number = part.line + offset
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield self._parse_line(line, f"{part.path}:{number}")

    def _parse_line(self, line: bytes, where: str) -> Document:
        text = _decode(line, where)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object but {type(record).__name__}")
        domain = None if self.domain_key is None else _string(record, self.domain_key, where)
        if domain == "":
            raise ValueError(f"{where}: key {self.domain_key!r} names no domain (it is empty)")
        document = Document(_string(record, self.json_key, where), domain, where)
        if b"\\u" in line:  # only an escape can smuggle half a surrogate pair into a string
            _check_encodable(document)
        return document


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: byte {error.start + 1}: {error.reason}") from None


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        keys = ", ".join(repr(name) for name in list(record)[:8])
        raise ValueError(f"{where}: no key {key!r}; there is {keys or 'none'}")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: key {key!r} is not a string but {type(value).__name__}")
    return value


def _check_encodable(document: Document) -> None:
    try:
        document.text.encode()
        (document.domain or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{document.where}: not Unicode: {error.reason}") from None
