"""Turns a chunk of input into token ids: the work of a preprocessing worker."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.tokenizer import Encoded, Tokenizer

_BOM = b"\xef\xbb\xbf"
_parse_json = json.JSONDecoder().decode  # json.loads also checks its options, which takes a quarter of its time
_NAMED = 10
"""How many broken documents of a chunk are named; the others are only counted."""


@dataclass(frozen=True)
class Lines:
    """Complete lines of a JSONL file, the first of which is its line number `first`."""

    name: str
    first: int
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class TextFile:
    """The content of a text file, which is one document."""

    name: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Rows:
    """Rows of a table, the first of which is its row number `first`.

    Domains are used only if the encoder has a `domain_key`. Texts are strings, or bytes of UTF-8 that has not been
    checked; anything else is an error of the input.
    """

    name: str
    first: int
    texts: list[Any]
    domains: list[Any]
    size: int
    """Approximate size of the texts, in bytes."""


Part = Lines | TextFile | Rows


class BrokenDocument(ValueError):  # noqa: N818  (what it is, as users read it)
    """A line, row or file that is not a document. `kind` gives the reason without details, for counting."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind + detail)
        self.kind = kind


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
        )

    def encode(self, chunk: Sequence[Part]) -> EncodedChunk:
        """Tokenize the documents of a chunk. ValueError "file:line: reason" for the first broken one."""
        by_domain: dict[str | None, _Documents] = {}
        broken: Counter[str] = Counter()
        named: list[str] = []
        for part in chunk:
            for number, raw in raw_documents(part):
                try:
                    text, domain = parse_document(raw, self.json_key, self.domain_key)
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
                by_domain[domain].texts.append(text)
        return EncodedChunk([self._group(*item) for item in by_domain.items()], broken, named)

    def _group(self, domain: str | None, documents: _Documents) -> Group:
        tokens, lengths = self.tokenizer.encode_arrays(documents.texts, self.dtype)
        kept = lengths[lengths > 0]
        skipped = len(lengths) - len(kept)
        if self.eod is not None:
            tokens, kept = _framed(tokens, kept, self.eod, at_start=False)
        if self.bos is not None:
            tokens, kept = _framed(tokens, kept, self.bos, at_start=True)
        return Group(domain, documents.first_seen, tokens, kept, skipped)


def parse_document(
    raw: bytes | tuple[Any, Any] | TextFile, json_key: str, domain_key: str | None
) -> tuple[str, str | None]:
    """Return the text and the domain of a document that `raw_documents` yields. BrokenDocument if it is not one."""
    if isinstance(raw, bytes):
        record = _json_object(raw)
        domain = None if domain_key is None else _string(record, domain_key)
        text = _string(record, json_key)
        escaped = b"\\u" in raw  # only an escape can put half a surrogate pair into a string
    elif isinstance(raw, TextFile):
        text, domain, escaped = _decode(raw.data.removeprefix(_BOM)), None, False
    else:
        domain = None if domain_key is None else _cell(raw[1], domain_key)
        text, escaped = _cell(raw[0], json_key), True
    if domain == "":
        raise BrokenDocument(f"key {domain_key!r} names no domain (it is empty)")
    if escaped:
        _check_encodable(text, domain or "")
    return text, domain


def raw_documents(part: Part) -> Iterator[tuple[int, bytes | tuple[Any, Any] | TextFile]]:
    """Yield the unparsed documents of a part, each with the number of its line or row."""
    if isinstance(part, TextFile):
        yield 0, part
    elif isinstance(part, Rows):
        yield from enumerate(zip(part.texts, part.domains, strict=True), part.first)
    else:
        for number, line in enumerate(part.data.split(b"\n"), part.first):
            content = line.removeprefix(_BOM) if number == 1 else line
            if content and not content.isspace():
                yield number, content


def where(part: Part, number: int) -> str:
    """Name a document in messages: "file:line", or the file where that is one document."""
    return part.name if isinstance(part, TextFile) else f"{part.name}:{number}"


def _framed(tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int32], mark: int, at_start: bool) -> Encoded:
    """Return the same documents, each with `mark` before or after it."""
    longer = lengths + np.int32(1)
    out = np.full(len(tokens) + len(lengths), mark, tokens.dtype)
    is_text = np.ones(len(out), np.bool_)
    ends = np.cumsum(longer, dtype=np.int64)
    is_text[ends - longer if at_start else ends - 1] = False
    out[is_text] = tokens
    return out, longer


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        record = _parse_json(_decode(line))
    except BrokenDocument:
        raise
    except (ValueError, RecursionError) as error:
        raise BrokenDocument("not JSON", f": {error}") from None
    if not isinstance(record, dict):
        raise BrokenDocument("not a JSON object", f" but {type(record).__name__}")
    return record


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BrokenDocument("not UTF-8", f": byte {error.start + 1}: {error.reason}") from None


def _string(record: dict[str, Any], key: str) -> str:
    if key not in record:
        keys = ", ".join(repr(name) for name in list(record)[:8])
        raise BrokenDocument(f"no key {key!r}", f"; its keys are {keys or 'none'}")
    value = record[key]
    if not isinstance(value, str):
        raise BrokenDocument(f"key {key!r} is not a string", f" but {type(value).__name__}")
    return value


def _cell(value: Any, key: str) -> str:
    return _decode(value) if isinstance(value, bytes) else _string({key: value}, key)


def _check_encodable(text: str, domain: str) -> None:
    try:
        text.encode()
        domain.encode()
    except UnicodeEncodeError as error:
        raise BrokenDocument("not Unicode", f": {error.reason}") from None
