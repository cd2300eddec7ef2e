"""Which ids end and start documents (what a tokenizer's folder says, then the names of its special tokens), and a
tokenizer that never makes them of text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers

Role = Literal["eos", "bos"]

USUAL_NAMES: dict[Role, tuple[str, ...]] = {
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOD]"),
    "bos": ("<|startoftext|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
}
"""Names of special tokens that end and start documents; asked where no file says anything."""

_FILES = (
    ("tokenizer_config.json", "{}_token"),
    ("special_tokens_map.json", "{}_token"),
    ("generation_config.json", "{}_token_id"),
    ("config.json", "{}_token_id"),
)

_MARK = re.compile(r"<.+>|\[.+\]")
"""Tokens that are written as special ones are, and need not be marked so."""


@dataclass(frozen=True)
class _Statement:
    """What one file names."""

    file: str
    value: Any
    ids: tuple[int, ...]
    """Of which any may be meant."""
    why_none: str
    """Said where there are none."""

    def __str__(self) -> str:
        found = f"id {' or '.join(map(str, self.ids))}" if self.ids else self.why_none
        return f"{self.file} names {json.dumps(self.value, ensure_ascii=False)} ({found})"


def named_by_folder(folder: Path, role: Role, vocabulary: Mapping[str, int], special: Mapping[str, int]) -> int | None:
    """The id that the files of a Hugging Face folder name for a role; None where no file names any.

    A list of ids (all that end a generation) agrees with each of its members; alone, its first counts. A bare id counts
    where its token is special or looks so: transformers writes 1 and 2 into the config.json of a Llama that nobody told
    of its tokenizer, where they may be letters. ValueError where files disagree, where one names no such token, and for
    a file that is not JSON.
    """
    statements = _statements(folder, role, vocabulary, special)
    if not statements:
        return None
    fewest = min((statement.ids for statement in statements), key=len)
    agreed = [number for number in fewest if all(number in statement.ids for statement in statements)]
    if not agreed:
        said = "; ".join(map(str, statements))
        raise ValueError(said if len(statements) == 1 else f"its files disagree: {said}")
    return agreed[0]


def named_as_usual(role: Role, special: Mapping[str, int]) -> int | None:
    """The id of the special token with a usual name; None where there is none. ValueError where there are several."""
    found = {name: special[name] for name in USUAL_NAMES[role] if name in special}
    if len(found) > 1:
        raise ValueError("it has " + " and ".join(f"{name} (id {number})" for name, number in found.items()))
    return next(iter(found.values()), None)


def starts_of(processor: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The ids that a tokenizer's post-processor (as its file describes it) puts before a text."""
    kind = None if processor is None else processor.get("type")
    if processor is None or kind == "ByteLevel":
        return ()
    if kind == "Sequence":
        return tuple(number for part in reversed(processor["processors"]) for number in starts_of(part))
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (int(processor["cls"][1]),)
    found: list[int] = []
    for piece in processor["single"]:
        if "SpecialToken" not in piece:
            break
        found += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return tuple(found)


def without_tokens(tokenizer: tokenizers.Tokenizer, names: Collection[str]) -> tokenizers.Tokenizer:
    """The same tokenizer, for text alone: its model lacks the tokens `names`, and all other tokens keep their ids.

    Text that spells one of them is cut into other tokens, as if it had never been in the vocabulary: pieces, bytes, or
    the unknown token. Holds for every model of the library (BPE, Unigram, WordPiece, WordLevel).
    """
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["content"] in names
    whole = tokenizers.Tokenizer.from_str(json.dumps(description))
    whole.encode_special_tokens = True  # special tokens are never looked for in text
    bare: dict[str, Any] = dict.fromkeys(description)
    bare |= {"version": description["version"], "added_tokens": [], "model": _pruned(model, frozenset(names))}
    whole.model = tokenizers.Tokenizer.from_str(json.dumps(bare)).model  # added tokens keep the ids that they have
    return whole


def _statements(
    folder: Path, role: Role, vocabulary: Mapping[str, int], special: Mapping[str, int]
) -> list[_Statement]:
    tokens = {number: token for token, number in vocabulary.items()}
    found = []
    for file, pattern in _FILES:
        if not (folder / file).is_file():
            continue
        try:
            content = json.loads((folder / file).read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / file}: not JSON: {error}") from None
        value = content.get(pattern.format(role)) if isinstance(content, dict) else None
        if isinstance(value, dict):  # a token with its properties
            value = value.get("content")
        lacks = "which the vocabulary lacks"
        if isinstance(value, str):
            found.append(_Statement(file, value, (vocabulary[value],) if value in vocabulary else (), lacks))
        elif isinstance(value, int | list) and not isinstance(value, bool) and value != []:
            numbers = value if isinstance(value, list) else [value]
            there = [number for number in numbers if type(number) is int and number in tokens]
            marks = tuple(number for number in there if tokens[number] in special or _MARK.fullmatch(tokens[number]))
            ordinary = f"which is {tokens[there[0]]!r}, no special token" if there else lacks
            found.append(_Statement(file, value, marks, ordinary))
    return found


def _pruned(model: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: a piece's id is its place, and no text holds the empty piece
        return {**model, "vocab": [["" if piece in names else piece, score] for piece, score in vocabulary]}
    pruned = {**model, "vocab": {piece: number for piece, number in vocabulary.items() if piece not in names}}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pruned["merges"] = [pair for pair in model["merges"] if names.isdisjoint(_of_merge(pair, prefix))]
    return pruned


def _of_merge(pair: list[str] | str, prefix: int) -> tuple[str, str, str]:
    """The two tokens that a BPE's merge joins, and the one that they become; the second's prefix goes."""
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return first, second, first + second[prefix:]
