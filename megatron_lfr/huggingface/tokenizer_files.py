"""The tokenizer of a Hugging Face folder: whether it fits the model, and which of its tokens ends a document."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from megatron_lfr.data.tokenizer import load_tokenizer
from megatron_lfr.fileio import write_atomic
from megatron_lfr.huggingface.config import read_json_object

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class FolderTokenizer:
    """A tokenizer.json whose every id is a row of the model's embedding, and what stands beside it."""

    path: Path
    settings: dict[str, Any]
    """Of tokenizer_config.json; empty where there is none."""
    eod_token: str | None
    """The token that ends a document; None where no file says it."""
    notes: list[str]
    """What whoever trains with it should know."""

    def copy(self, folder: Path) -> None:
        """Write the tokenizer into a new folder."""
        folder.mkdir()
        shutil.copyfile(self.path, folder / FILE)
        if self.settings:
            write_atomic(folder / SETTINGS, json.dumps(self.settings, indent=2, ensure_ascii=False))


def find_tokenizer(folder: Path, config: Mapping[str, Any], vocab_size: int) -> FolderTokenizer | None:
    """The tokenizer of a Hugging Face folder with the config.json `config`; None where it has no tokenizer.json.

    ValueError for a file that is no tokenizer, or one with ids for which a model of `vocab_size` tokens has no row.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    tokenizer = load_tokenizer(str(path))  # refuses what is no tokenizer
    vocabulary: dict[str, int] = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
    _check_fits(path, vocabulary, vocab_size)
    settings = read_json_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    eod, notes = _find_eod(folder, config, settings, vocabulary)
    if eod is None:
        try:
            eod = {number: token for token, number in vocabulary.items()}[tokenizer.eod]
            notes.append(f"no file says which token ends a document; {eod!r} is taken, --eod-token names another")
        except ValueError:
            notes.append("no file says which token ends a document: name it with --eod-token")
    notes += _missing_tokens(folder, settings, vocabulary)
    return FolderTokenizer(path, settings, eod, notes)


def _check_fits(path: Path, vocabulary: Mapping[str, int], vocab_size: int) -> None:
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= vocab_size)
    if not beyond:
        return
    shown = ", ".join(f"{token!r} ({number})" for number, token in beyond[:5]) + (", ..." if len(beyond) > 5 else "")
    needed = beyond[-1][0] + 1
    raise ValueError(
        f"{path}: the tokenizer needs {needed} rows, vocab_size in config.json is {vocab_size}; without one: {shown}. "
        f"Give them rows with transformers' model.resize_token_embeddings({needed}) and save_pretrained, take them out "
        f"of {FILE}, or move it away to convert the weights alone"
    )


def _find_eod(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> tuple[str | None, list[str]]:
    """(the token that ends a document by the first file that names one, notes on files that say something else)."""
    tokens: dict[int | str, str] = {number: token for token, number in vocabulary.items()}
    tokens |= {token: token for token in vocabulary}
    eod: str | None = None
    notes = []
    for file, ends in _ends(folder, config, settings):
        token = tokens.get(ends[0])
        if token is None:
            notes.append(f"{file}: the end token {ends[0]!r} is none of {FILE}'s")
        elif eod is None:
            eod = token
            if len(ends) > 1:
                notes.append(f"{file}: of the end tokens {ends}, {eod!r} ends documents; the others are not kept")
        elif token != eod:
            notes.append(f"{file}: the end token is {token!r}; {eod!r} ends documents, --eod-token names another")
    return eod, notes


def _ends(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[str, list[int | str]]]:
    """(file, the end tokens that it names) of the files that name any."""
    generation = folder / "generation_config.json"
    beside = read_json_object(generation) if generation.is_file() else {}
    token = settings.get("eos_token")
    for file, value in (
        ("config.json", config.get("eos_token_id")),
        (generation.name, beside.get("eos_token_id")),
        (SETTINGS, token.get("content") if isinstance(token, dict) else token),
    ):
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(own, bool) or not isinstance(own, int | str) for own in values):
            raise ValueError(f"{folder / file}: the end token is {value!r}; expected a token or its id")
        if values:
            yield file, values


def _missing_tokens(folder: Path, settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Iterator[str]:
    """Notes on tokens that other files add, which transformers knows and tokenizer.json does not."""
    decoder = settings.get("added_tokens_decoder")
    contents = [own.get("content") for own in decoder.values() if isinstance(own, dict)] if decoder else []
    added = folder / "added_tokens.json"
    for file, names in ((SETTINGS, contents), (added.name, read_json_object(added) if added.is_file() else {})):
        if missing := [str(name) for name in names if name not in vocabulary]:
            yield f"{file} adds {', '.join(map(repr, missing))}, which {FILE} does not have: not used here"
