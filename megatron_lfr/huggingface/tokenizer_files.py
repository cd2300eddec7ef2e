"""The tokenizer of a Hugging Face folder: whether it fits the model, and which of its tokens ends a document."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.data.corpus.special_tokens import Role
from megatron_lfr.data.corpus.tokenizer import FileTokenizer
from megatron_lfr.fileio import write_atomic
from megatron_lfr.huggingface.config_keys import GENERATION as GENERATION_KEYS
from megatron_lfr.huggingface.json_values import read_json_object

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
GENERATION, CHAT = "generation_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class FolderTokenizer:
    """A tokenizer.json whose every id is a row of the model's embedding, with its settings."""

    tokenizer: FileTokenizer
    path: Path
    settings: dict[str, Any]
    """Content of tokenizer_config.json, and the tokens that special_tokens_map.json alone names."""
    eod_token: str | None
    """The token that ends a document; None where the folder does not show which it is."""
    notes: list[str]
    """What users who train with this tokenizer should know."""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer adds a token at the start of a text."""
        return self.tokenizer.bos(None) is not None

    def copy(self, folder: Path) -> None:
        """Write the tokenizer into a new folder."""
        folder.mkdir()
        shutil.copyfile(self.path, folder / FILE)
        if self.settings:
            write_atomic(folder / SETTINGS, json.dumps(self.settings, indent=2, ensure_ascii=False))
        copy_chat(self.path, folder)
        if generation := _read_generation(self.path.parent):
            write_atomic(folder / GENERATION, json.dumps(generation, indent=2, ensure_ascii=False))


def find_tokenizer(folder: Path, vocab_size: int, eod_token: str | None) -> FolderTokenizer | None:
    """Read the tokenizer of a Hugging Face folder; None where it has no tokenizer.json. eod_token: value of
    --eod-token.

    Raises ValueError for a file that is not a tokenizer, or has ids for which a model of `vocab_size` tokens has no
    row.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    tokenizer = FileTokenizer(path, eod_token)
    _check_fits(path, tokenizer.vocabulary, vocab_size)
    settings = _read_settings(folder)
    try:
        eod, notes = tokenizer.token(tokenizer.eod), []
    except ValueError as error:  # the weights can be used without it
        eod, notes = None, [str(error)]
    notes += _missing_tokens(folder, settings, tokenizer.vocabulary)
    return FolderTokenizer(tokenizer, path, settings, eod, notes)


def copy_chat(tokenizer: Path, folder: Path) -> None:
    """Copy the template of a chat that lies beside a tokenizer.json, if there is one, into a folder."""
    if (chat := tokenizer.with_name(CHAT)).is_file():
        shutil.copyfile(chat, folder / CHAT)


def generation_settings(tokenizer: Path | None, marks: Mapping[Role, int | None]) -> dict[str, Any]:
    """Return the content of generation_config.json: what lies beside the tokenizer.json, if anything, with the ids of
    `marks`. A list of ids that end a generation, as those of chats are, stays where it has the one of `marks`; so does
    the id that starts one, where documents start with none."""
    beside = None if tokenizer is None else tokenizer.with_name(GENERATION)
    settings = read_json_object(beside) if beside is not None and beside.is_file() else {}
    for role, number in marks.items():
        given = settings.get(f"{role}_token_id")
        is_among = isinstance(given, list) and number in given
        if not (is_among or (role == "bos" and number is None)):
            settings[f"{role}_token_id"] = number
    return {"bos_token_id": None, **settings}


def _read_generation(folder: Path) -> dict[str, Any]:
    """Return how the model of a Hugging Face folder generates: its generation_config.json, or where there is none, what
    transformers then reads in config.json."""
    if (path := folder / GENERATION).is_file():
        return read_json_object(path)
    settings = read_json_object(folder / "config.json")
    ids = (f"{role}_token_id" for role in ("bos", "eos", "pad"))
    return {key: settings[key] for key in (*ids, *GENERATION_KEYS) if settings.get(key) is not None}


def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for file in ("special_tokens_map.json", SETTINGS):  # the second one decides
        settings |= read_json_object(folder / file) if (folder / file).is_file() else {}
    return settings


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


def _missing_tokens(folder: Path, settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Iterator[str]:
    """Yield notes on tokens that other files add, which transformers knows and tokenizer.json does not."""
    decoder = settings.get("added_tokens_decoder")
    entries = decoder.values() if isinstance(decoder, dict) else ()
    contents = [entry.get("content") for entry in entries if isinstance(entry, dict)]
    added = folder / "added_tokens.json"
    for file, names in ((SETTINGS, contents), (added.name, read_json_object(added) if added.is_file() else {})):
        if missing := [str(name) for name in names if name not in vocabulary]:
            yield f"{file} adds {', '.join(map(repr, missing))}, which {FILE} does not have: not used here"
