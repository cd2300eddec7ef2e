"""Supervised records as documents, and which of their tokens are trained on.

A record is `{"prompt": ..., "response": ...}`, or a chat, `{"messages": [{"role": ..., "content": ...}, ...]}`, which
the tokenizer's chat template writes as text. Each stretch of text that is trained on, and each that is not, is
tokenized by itself, so that no token crosses the border between them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.mask import Mask
from megatron_lfr.data.corpus.tokenizer import FileTokenizer, Tokenizer
from megatron_lfr.data.preprocess.chat import ASSISTANT, ChatTemplate, Message, Span
from megatron_lfr.data.preprocess.documents import BrokenDocument, check_encodable, json_object, string_of

Ids = npt.NDArray[Any]

_BEFORE = "\n"
"""Put before a stretch that is not the first, and its tokens removed: some tokenizers add a space to a beginning."""


@dataclass(frozen=True)
class RecordKeys:
    """The keys of a JSON line that make it a supervised record."""

    prompt: str
    response: str
    messages: str


class Stretch(NamedTuple):
    """Text of a document, and whether it is trained on."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Record:
    """A document, in stretches."""

    stretches: list[Stretch]
    is_chat: bool
    """Whether a template wrote it: what spells a special token is one then."""
    trains_end: bool
    """Whether the end-of-document token is trained on."""


class EncodedRecords(NamedTuple):
    """The records that have a token: tokens and mask [n], and the length of each [records]."""

    tokens: Ids
    mask: Mask
    lengths: npt.NDArray[np.int32]


def parse_record(
    line: bytes, keys: RecordKeys, domain_key: str | None, chat: ChatTemplate
) -> tuple[Record, str | None]:
    """Return the record and the domain of a JSON line. BrokenDocument if it is none; ValueError for a chat without a
    template."""
    fields = json_object(line)
    domain = None if domain_key is None else string_of(fields, domain_key)
    if domain == "":
        raise BrokenDocument(f"key {domain_key!r} names no domain (it is empty)")
    if keys.messages in fields:
        if other := next((key for key in (keys.prompt, keys.response) if key in fields), None):
            raise BrokenDocument(f"both keys {keys.messages!r} and {other!r}")
        messages = _messages(fields[keys.messages], keys.messages)
        stretches = _cut(*chat.render(messages))
        record = Record(stretches, is_chat=True, trains_end=messages[-1]["role"] == ASSISTANT)
    else:
        prompt, response = (string_of(fields, key) for key in (keys.prompt, keys.response))
        record = Record([Stretch(prompt, False), Stretch(response, True)], is_chat=False, trains_end=True)
    if b"\\u" in line:  # only an escape can put half a surrogate pair into a string
        check_encodable(domain or "", *(stretch.text for stretch in record.stretches))
    return record, domain


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, dtype: np.dtype[Any], bos: int | None, eod: int | None
) -> EncodedRecords:
    """Tokenize records; those without a token are left out. Each begins with `bos`, which is not trained on, and ends
    with `eod`, unless its template has written them."""
    tokens, masks = [np.empty(0, dtype)], [np.empty(0, np.uint8)]
    for record, parts in zip(records, _tokenize(records, tokenizer, dtype), strict=True):
        if not any(map(len, parts)):
            continue
        mask = np.repeat([np.uint8(stretch.trained) for stretch in record.stretches], list(map(len, parts)))
        if bos is not None and not (record.is_chat and np.concatenate(parts)[0] == bos):
            parts, mask = [np.array([bos], dtype), *parts], np.append(np.uint8(0), mask)
        if eod is not None:
            if not (record.is_chat and np.concatenate(parts)[-1] == eod):
                parts, mask = [*parts, np.array([eod], dtype)], np.append(mask, np.uint8(0))
            mask[-1] = record.trains_end
        tokens.append(np.concatenate(parts))
        masks.append(mask)
    lengths = np.array([len(document) for document in tokens[1:]], np.int32)
    return EncodedRecords(np.concatenate(tokens), np.concatenate(masks), lengths)


def _tokenize(records: Sequence[Record], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> list[list[Ids]]:
    """Return the tokens of each stretch of each record."""
    parts: list[list[Ids]] = [[np.empty(0, dtype)] * len(record.stretches) for record in records]
    of_kind: dict[tuple[bool, bool], list[tuple[int, int]]] = defaultdict(list)
    for number, record in enumerate(records):
        for stretch in range(len(record.stretches)):
            of_kind[record.is_chat, stretch > 0].append((number, stretch))
    for (is_chat, is_later), numbers in of_kind.items():
        texts = [records[number].stretches[stretch].text for number, stretch in numbers]
        encoded = _encode(texts, tokenizer, dtype, is_chat, is_later)
        for (number, stretch), ids in zip(numbers, encoded, strict=True):
            parts[number][stretch] = ids
    return parts


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: np.dtype[Any], is_chat: bool, is_later: bool) -> list[Ids]:
    """Return the tokens of each text. is_later: the texts come after others, which are tokenized by themselves."""

    def encode(texts: list[str]) -> list[Ids]:
        if is_chat:
            assert isinstance(tokenizer, FileTokenizer)
            tokens, lengths = tokenizer.encode_template(texts, dtype)
        else:
            tokens, lengths = tokenizer.encode_arrays(texts, dtype)
        return np.split(tokens, np.cumsum(lengths)[:-1])

    if not is_later:
        return encode(texts)
    (before,) = encode([_BEFORE])
    encoded = encode([_BEFORE + text for text in texts])
    joined = [i for i, ids in enumerate(encoded) if not np.array_equal(ids[: len(before)], before)]
    encoded = [ids[len(before) :] for ids in encoded]
    for i, ids in zip(joined, encode([texts[i] for i in joined]) if joined else [], strict=True):
        encoded[i] = ids
    return encoded


def _cut(text: str, spans: Sequence[Span]) -> list[Stretch]:
    """Cut a text into what lies inside of spans, which is trained on, and what does not."""
    stretches, at = [], 0
    for first, last in spans:
        stretches += [Stretch(text[at:first], False), Stretch(text[first:last], True)]
        at = last
    return [stretch for stretch in (*stretches, Stretch(text[at:], False)) if stretch.text]


def _messages(value: Any, key: str) -> list[Message]:
    """Check the messages of a chat; BrokenDocument where they are none."""
    if not isinstance(value, list) or not value:
        raise BrokenDocument(f"key {key!r} is not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BrokenDocument(f"key {key!r} holds no message", ": each needs a role and a content, both strings")
    return value
