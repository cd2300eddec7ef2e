"""Documents of the input, as it has them: parts of files, and what is broken in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BOM = b"\xef\xbb\xbf"
_parse_json = json.JSONDecoder().decode  # json.loads also checks its options, which takes a quarter of its time


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


def parse_document(
    raw: bytes | tuple[Any, Any] | TextFile, json_key: str, domain_key: str | None
) -> tuple[str, str | None]:
    """Return the text and the domain of a document that `raw_documents` yields. BrokenDocument if it is not one."""
    if isinstance(raw, bytes):
        record = json_object(raw)
        domain = None if domain_key is None else string_of(record, domain_key)
        text = string_of(record, json_key)
        escaped = b"\\u" in raw  # only an escape can put half a surrogate pair into a string
    elif isinstance(raw, TextFile):
        text, domain, escaped = _decode(raw.data.removeprefix(_BOM)), None, False
    else:
        domain = None if domain_key is None else _cell(raw[1], domain_key)
        text, escaped = _cell(raw[0], json_key), True
    if domain == "":
        raise BrokenDocument(f"key {domain_key!r} names no domain (it is empty)")
    if escaped:
        check_encodable(text, domain or "")
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


def json_object(line: bytes) -> dict[str, Any]:
    """Parse a JSON line; BrokenDocument where it is no object."""
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


def string_of(record: dict[str, Any], key: str) -> str:
    """Return the string of a key; BrokenDocument where there is none."""
    if key not in record:
        keys = ", ".join(repr(name) for name in list(record)[:8])
        raise BrokenDocument(f"no key {key!r}", f"; its keys are {keys or 'none'}")
    value = record[key]
    if not isinstance(value, str):
        raise BrokenDocument(f"key {key!r} is not a string", f" but {type(value).__name__}")
    return value


def _cell(value: Any, key: str) -> str:
    return _decode(value) if isinstance(value, bytes) else string_of({key: value}, key)


def check_encodable(*texts: str) -> None:
    """Raise BrokenDocument for text that UTF-8 cannot hold."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise BrokenDocument("not Unicode", f": {error.reason}") from None
