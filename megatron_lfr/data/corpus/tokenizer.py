"""Tokenizers: a `tokenizers` JSON file, the two files of a GPT-2 tokenizer, or plain bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import tokenizers

from megatron_lfr.data.config import vocabulary_and_merges
from megatron_lfr.data.corpus.gpt2_files import describe
from megatron_lfr.data.corpus.special_tokens import (
    USUAL_NAMES,
    Role,
    named_as_usual,
    named_by_folder,
    starts_of,
    without_tokens,
)

Encoded: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[np.int32]]

_IN_FOLDERS = "tokenizer.json"


class Tokenizer(Protocol):
    """Turns text into token ids and back. Adds nothing to a text: no start token, no end-of-document token."""

    @property
    def name(self) -> str:
        """The value of --tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod(self) -> int:
        """The id that ends a document. ValueError when the tokenizer has none."""

    def bos(self, asked: bool | None) -> int | None:
        """Return the id that starts a document, or None.

        asked: True for --bos (ValueError when the tokenizer has none), False for --no-bos; None for what the tokenizer
        itself puts before a text.
        """

    def token(self, number: int) -> str:
        """Return the token of an id, for messages."""

    @property
    def fingerprint(self) -> str:
        """A string that differs between tokenizers that give different ids."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""

    def encode_arrays(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        """Return the ids of all texts in one array [n] of type `dtype`, and the length of each text [texts]."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; undecodable bytes become U+FFFD."""


def load_tokenizer(spec: str, eod_token: str | None = None) -> Tokenizer:
    """Load the tokenizer that `spec` names: a `tokenizers` JSON file, a folder that holds tokenizer.json, `bytes`, or
    the two files of a GPT-2 tokenizer as VOCAB.json,MERGES.txt.

    `eod_token` names the end-of-document token. Without it, the files beside a tokenizer.json say which it is, or
    else the usual names of special tokens (special_tokens.py). ValueError for a file that is missing or is not a
    tokenizer, and for an `eod_token` that it lacks.
    """
    if spec == "bytes":
        if eod_token is not None:
            raise ValueError(f"--eod-token {eod_token}: the bytes tokenizer has its own (id 256)")
        return ByteTokenizer()
    files = [Path(file) for file in vocabulary_and_merges(spec) or (spec,)]
    if files[0].is_dir():
        files[0] = files[0] / _IN_FOLDERS
    for path in files:
        if not path.is_file():
            raise ValueError(
                f"tokenizer {path}: no such file; give a tokenizer.json, a folder that holds one, 'bytes', or a GPT-2 "
                "tokenizer's VOCAB.json,MERGES.txt"
            )
    return FileTokenizer(files[0], eod_token, merges=files[1] if len(files) > 1 else None)


def end_of_document(tokenizer: Tokenizer | None) -> int | None:
    """Return the id that ends documents; None without a tokenizer. ValueError where the tokenizer has none."""
    return None if tokenizer is None else tokenizer.eod


def recorded_tokenizer(config: Mapping[str, Any], moved_to: str | None = None) -> Tokenizer | None:
    """Load the tokenizer that a run's config.yaml names, from `moved_to` if given; None where it names none. Errors as
    `load_tokenizer`."""
    spec, eod = moved_to or config.get("tokenizer_model"), config.get("eod_token")
    return None if spec is None else load_tokenizer(str(spec), None if eod is None else str(eod))


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in batches of about 64 thousand characters: encodings take a hundred times the memory of ids."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= 1 << 16:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class ByteTokenizer:
    """One id for each byte of the text's UTF-8, and id 256 for the end of a document."""

    vocab_size = 257
    eod = 256
    name = fingerprint = "bytes"

    def bos(self, asked: bool | None) -> int | None:
        if asked:
            raise ValueError("--bos: the bytes tokenizer has no token that starts a document")
        return None

    def token(self, number: int) -> str:
        return "end of document" if number == self.eod else repr(bytes([number]))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_arrays(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        data = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, data), np.int32, len(data))
        return np.frombuffer(b"".join(data), np.uint8).astype(dtype), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer of the `tokenizers` library, in one file that describes it, or in GPT-2's two: its vocabulary in
    `path`, and `merges`.

    A file's own truncation and padding are switched off, as they would cut documents. No text becomes the token that
    ends or starts a document, or another special token (except the unknown one): text that spells it is encoded as
    ordinary text, so that no document can end itself.
    """

    def __init__(self, path: Path, eod_token: str | None = None, *, merges: Path | None = None) -> None:
        self.name = str(path) if merges is None else f"{path},{merges}"
        self.path, self._merges = path, merges
        try:
            files = [file.read_bytes() for file in (path, merges) if file is not None]
            self._content = files[0] if merges is None else describe(*files)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._content)
        except OSError:
            raise
        except Exception as error:  # the library raises plain Exception for whatever is wrong with a file
            raise ValueError(f"tokenizer {self.name}: not a tokenizer file: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.fingerprint = "sha256 " + hashlib.sha256(b"\0".join(files)).hexdigest()
        self._folder = path.parent if path.name == _IN_FOLDERS else None
        self._eod_token = eod_token
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        if not self.vocabulary:
            raise ValueError(f"tokenizer {self.name}: its vocabulary is empty")
        self.vocab_size: int = max(self.vocabulary.values()) + 1
        if eod_token is not None and eod_token not in self.vocabulary:
            raise ValueError(f"--eod-token {eod_token}: not in the vocabulary of tokenizer {self.name}")
        description = json.loads(self._content)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        self._starts = starts_of(description.get("post_processor"))
        model = description["model"]
        self._unknown: int | None = self.vocabulary.get(model.get("unk_token") or "", model.get("unk_id"))
        """The id for text that the model does not know; of Unigram, the file gives the id."""
        self._bytes = self._find_bytes(model)
        self._reserved = self._find_reserved()

    @property
    def has_neighbours(self) -> bool:
        """Whether other files of a Hugging Face folder, such as generation_config.json, may lie beside it."""
        return self._merges is None

    def write(self, path: Path) -> None:
        """Write the JSON file that describes the tokenizer."""
        path.write_bytes(self._content)

    @cached_property
    def eod(self) -> int:
        if self._eod_token is not None:
            return self.vocabulary[self._eod_token]
        return self._named("eos", "end-of-document token", "name it with --eod-token")

    def bos(self, asked: bool | None) -> int | None:
        if asked is False or (asked is None and not self._starts):
            return None
        if asked is None and len(self._starts) > 1:
            starts = ", ".join(map(self.token, self._starts))
            raise ValueError(f"tokenizer {self.name}: starts a text with several tokens ({starts}); give --no-bos")
        start = self._start
        if start != self._or_none(lambda: self.eod):
            return start
        if asked:
            raise ValueError(
                f"--bos: {self.token(start)} ends documents, and cannot start them in tokenizer {self.name}"
            )
        return None  # the end of a document comes before the next one anyway

    def token(self, number: int) -> str:
        return str(self._tokenizer.id_to_token(number))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        tokens, lengths = self.encode_arrays(texts, np.dtype(np.int64))
        return [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])] if texts else []

    def encode_arrays(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        parts = [self._encode_batch(batch, dtype) for batch in _batches(texts)]
        if not parts:
            return np.empty(0, dtype), np.empty(0, np.int32)
        tokens, lengths = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths)

    def encode_template(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        """Return the ids of texts that a chat template wrote, as `encode_arrays`: what spells a special token is
        one."""
        parts = [_as_arrays(self._encodings(self._with_special, batch), dtype) for batch in _batches(texts)]
        tokens, lengths = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths)

    @cached_property
    def special_tokens(self) -> list[str]:
        """The tokens that no text becomes, unless a chat template wrote it."""
        return sorted(map(self.token, np.flatnonzero(self._reserved).tolist()))

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def _encode_batch(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        encodings = self._encodings(self._tokenizer, texts)
        tokens, lengths = _as_arrays(encodings, dtype)
        spelled = self._reserved[tokens]
        if not spelled.any():
            return tokens, lengths
        for i in np.unique(np.repeat(np.arange(len(texts)), lengths)[spelled]):
            (encodings[i],) = self._encodings(self._without_reserved, [texts[i]])
        tokens, lengths = _as_arrays(encodings, dtype)
        if self._reserved[tokens].any():  # the unknown token, where it is also the end-of-document token
            token = self.token(int(tokens[self._reserved[tokens]][0]))
            raise ValueError(f"tokenizer {self.name}: text becomes {token}; name another token with --eod-token")
        return tokens, lengths

    def _encodings(self, tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[tokenizers.Encoding]:
        try:
            return tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # plain again, for example where a model lacks its unknown token
            raise ValueError(f"tokenizer {self.name}: {error}") from None

    @cached_property
    def _start(self) -> int:
        """The id that --bos adds."""
        if len(self._starts) == 1:
            return self._starts[0]
        return self._named("bos", "start-of-document token", "go without --bos")

    @cached_property
    def _without_reserved(self) -> tokenizers.Tokenizer:
        reserved = set(np.flatnonzero(self._reserved).tolist()) - {self._unknown}
        tokenizer = without_tokens(self._tokenizer, set(map(self.token, reserved)))
        for number in reserved.difference(self._special.values()):
            text = self.decode([number])
            if text and not tokenizer.encode(text, add_special_tokens=False).ids:  # a letter of a byte-level alphabet
                token = self.token(number)
                raise ValueError(
                    f"tokenizer {self.name}: text with {token} could not be written without it; name another "
                    "token with --eod-token"
                )
        return tokenizer

    def _find_bytes(self, model: Mapping[str, Any]) -> list[int]:
        """Return the ids of the bytes with which the model spells characters that it lacks."""
        names = (f"<0x{byte:02X}>" for byte in range(256)) if model.get("byte_fallback") else ()
        return [self.vocabulary[name] for name in names if name in self.vocabulary]

    def _find_reserved(self) -> npt.NDArray[np.bool_]:
        """Return a mask [vocab_size] of the ids that no text may become."""
        reserved = np.zeros(self.vocab_size, np.bool_)
        reserved[[*self._special.values(), *self._starts]] = True
        reserved[self._bytes] = False  # text becomes these, even where a file marks them as special
        if self._unknown is not None:
            reserved[self._unknown] = False  # any text may become this one
        for number in (self._or_none(lambda: self._start), self._or_none(lambda: self.eod)):
            if number is not None:
                reserved[number] = True
        return reserved

    def _named(self, role: Role, what: str, hint: str) -> int:
        """Return the id of a role, from the folder or the special tokens. ValueError with `hint` if it is unclear."""
        try:
            number = None
            if self._folder is not None:
                number = named_by_folder(self._folder, role, self.vocabulary, self._special)
            if number is None:
                number = named_as_usual(role, self._special)
        except ValueError as error:
            raise ValueError(f"tokenizer {self.name}: which is its {what}? {error}; {hint}") from None
        if number is None:
            names = ", ".join(USUAL_NAMES[role])
            raise ValueError(f"tokenizer {self.name}: no {what}: none of its special tokens is {names}; {hint}")
        return number

    @staticmethod
    def _or_none(find: Callable[[], int]) -> int | None:
        try:
            return find()
        except ValueError:
            return None


def _as_arrays(encodings: list[tokenizers.Encoding], dtype: np.dtype[Any]) -> Encoded:
    lengths = np.fromiter(map(len, encodings), np.int32, len(encodings))
    ids = chain.from_iterable(encoding.ids for encoding in encodings)  # one list of Python numbers at a time
    return np.fromiter(ids, dtype, count=int(lengths.sum(dtype=np.int64))), lengths
