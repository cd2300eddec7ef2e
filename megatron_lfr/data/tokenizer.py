"""Tokenizers: a `tokenizers` JSON file, or plain bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import tokenizers

EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOD]")
"""Names under which an end-of-document token is looked for, in this order."""

Encoded: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[np.int32]]


class Tokenizer(Protocol):
    """Text to token ids and back. Nothing is added to a text: no start token, no end-of-document token."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod(self) -> int:
        """The id that ends a document. ValueError when the tokenizer has none."""

    @property
    def fingerprint(self) -> str:
        """Tells this tokenizer from others."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""

    def encode_arrays(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        """The same ids, those of all texts in one array [n] of the type, and the length of each text [texts]."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for; undecodable bytes become U+FFFD."""


def load_tokenizer(spec: str, eod_token: str | None = None) -> Tokenizer:
    """The tokenizer that `spec` names: a `tokenizers` JSON file, a folder that holds tokenizer.json, or `bytes`.

    `eod_token` names the end-of-document token where it is none of `EOD_NAMES`; without it, a Hugging Face folder's
    other files are asked for theirs. ValueError for a file that is missing or is not a tokenizer, and for an
    `eod_token` that it lacks.
    """
    if spec == "bytes":
        if eod_token is not None:
            raise ValueError(f"--eod-token {eod_token}: the bytes tokenizer has its own (id 256)")
        return ByteTokenizer()
    path, folder = Path(spec), None
    if path.is_dir():
        path, folder = path / "tokenizer.json", path
    if not path.is_file():
        raise ValueError(f"tokenizer {path}: no such file; give a tokenizer.json, a folder that holds one, or 'bytes'")
    return FileTokenizer(path, eod_token, folder)


def recorded_tokenizer(config: Mapping[str, Any], moved_to: str | None = None) -> Tokenizer | None:
    """The tokenizer that a run's config.yaml names, from where it lies now; None where none is named. Errors as
    `load_tokenizer`."""
    spec, eod = moved_to or config.get("tokenizer_model"), config.get("eod_token")
    return None if spec is None else load_tokenizer(str(spec), None if eod is None else str(eod))


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """The texts in batches of some 64 thousand characters: the library's encodings are a hundred times their ids."""
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
    fingerprint = "bytes"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_arrays(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        data = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, data), np.int32, len(data))
        return np.frombuffer(b"".join(data), np.uint8).astype(dtype), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer of the `tokenizers` library.

    A file's own truncation and padding are switched off, as they would cut documents. Text that spells a special token
    is encoded as the text it is, so that no document can end itself. `folder` is the Hugging Face folder that holds
    the file, where there is one.
    """

    def __init__(self, path: Path, eod_token: str | None = None, folder: Path | None = None) -> None:
        try:
            content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except OSError:
            raise
        except Exception as error:  # the library raises plain Exception for whatever is wrong with a file
            raise ValueError(f"tokenizer {path}: not a tokenizer file: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.fingerprint = f"sha256 {hashlib.sha256(content).hexdigest()}"
        self._path = path
        vocabulary = self._tokenizer.get_vocab()
        if not vocabulary:
            raise ValueError(f"tokenizer {path}: its vocabulary is empty")
        self.vocab_size: int = max(vocabulary.values()) + 1
        names = EOD_NAMES if eod_token is None else (eod_token,)
        self._eod: int | None = next((vocabulary[name] for name in names if name in vocabulary), None)
        if self._eod is None and folder is not None and eod_token is None:
            self._eod = eod_of_folder(folder, vocabulary)
        if eod_token is not None and self._eod is None:
            raise ValueError(f"--eod-token {eod_token}: not in the vocabulary of tokenizer {path}")

    @property
    def eod(self) -> int:
        if self._eod is None:
            names = ", ".join(EOD_NAMES)
            raise ValueError(
                f"tokenizer {self._path}: no end-of-document token among {names}; name it with --eod-token"
            )
        return self._eod

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encodings(texts)]

    def encode_arrays(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        parts = [self._encode_batch(batch, dtype) for batch in _batches(texts)]
        if not parts:
            return np.empty(0, dtype), np.empty(0, np.int32)
        tokens, lengths = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths)

    def _encode_batch(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        encodings = self._encodings(texts)
        lengths = np.fromiter(map(len, encodings), np.int32, len(encodings))
        ids = chain.from_iterable(encoding.ids for encoding in encodings)  # one list of Python numbers at a time
        return np.fromiter(ids, dtype, count=int(lengths.sum(dtype=np.int64))), lengths

    def _encodings(self, texts: list[str]) -> list[tokenizers.Encoding]:
        try:
            return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # plain again: a model that lacks its unknown token, say
            raise ValueError(f"tokenizer {self._path}: {error}") from None

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def eod_of_folder(folder: Path, vocabulary: dict[str, int]) -> int | None:
    """The end-of-document id that a Hugging Face folder's files name; None when no file names one of the vocabulary.

    ValueError for a file that is not JSON.
    """
    for file, key in (
        ("tokenizer_config.json", "eos_token"),
        ("special_tokens_map.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
    ):
        if not (folder / file).is_file():
            continue
        try:
            content = json.loads((folder / file).read_bytes())
        except ValueError as error:
            raise ValueError(f"tokenizer {folder / file}: not JSON: {error}") from None
        value = content.get(key) if isinstance(content, dict) else None
        if isinstance(value, dict):  # a token with its properties
            value = value.get("content")
        elif isinstance(value, list):  # all ids that end a generation, the document's end first
            value = value[0] if value else None
        if isinstance(value, str) and value in vocabulary:
            return vocabulary[value]
        if type(value) is int and value in vocabulary.values():
            return value
    return None
