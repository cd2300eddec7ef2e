"""Finds the ids that end and start documents, in a tokenizer's folder or by the names of its special tokens, and makes
a tokenizer that never gives these ids for text."""

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
"""Usual names of special tokens that end and start documents, for tokenizers whose files do not say."""

_FILES = (
    ("tokenizer_config.json", "{}_token"),
    ("special_tokens_map.json", "{}_token"),
    ("generation_config.json", "{}_token_id"),
    ("config.json", "{}_token_id"),
)

_MARK = re.compile(r"<.+>|\[.+\]")
"""Tokens that look like special ones, whether or not they are marked as special."""


@dataclass(frozen=True)
class _Statement:
    """What one file says about a role."""

    file: str
    value: Any
    ids: tuple[int, ...]
    """The ids that it may mean."""
    why_none: str
    """The reason, for messages, if there are none."""

    def __str__(self) -> str:
        meaning = f"id {' or '.join(map(str, self.ids))}" if self.ids else self.why_none
        return f"{self.file} names {json.dumps(self.value, ensure_ascii=False)} ({meaning})"


def named_by_folder(folder: Path, role: Role, vocabulary: Mapping[str, int], special: Mapping[str, int]) -> int | None:
    """Return the id that the files of a Hugging Face folder name for a role; None where no file names any.

    A list of ids (all that end a generation) agrees with each of its members; if there is nothing else, its first is
    returned. A bare id counts only if its token is special or looks so: transformers writes 1 and 2, which may be
    letters, into the config.json of a Llama that was made without a tokenizer. ValueError where files disagree, where
    a file names no such token, and for a file that is not JSON.
    """
    statements = _statements(folder, role, vocabulary, special)
    if not statements:
        return None
    fewest = min((statement.ids for statement in statements), key=len)
    agreed = [number for number in fewest if all(number in statement.ids for statement in statements)]
    if not agreed:
        listed = "; ".join(map(str, statements))
        raise ValueError(listed if len(statements) == 1 else f"its files disagree: {listed}")
    return agreed[0]


def named_as_usual(role: Role, special: Mapping[str, int]) -> int | None:
    """Return the id of the special token with a usual name; None if there is none. ValueError if there are several."""
    ids = {name: special[name] for name in USUAL_NAMES[role] if name in special}
    if len(ids) > 1:
        raise ValueError("it has " + " and ".join(f"{name} (id {number})" for name, number in ids.items()))
    return next(iter(ids.values()), None)


def starts_of(processor: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Return the ids that a tokenizer's post-processor, as its file describes it, puts before a text."""
    kind = None if processor is None else processor.get("type")
    if processor is None or kind == "ByteLevel":
        return ()
    if kind == "Sequence":
        return tuple(number for part in reversed(processor["processors"]) for number in starts_of(part))
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (int(processor["cls"][1]),)
    starts: list[int] = []
    for piece in processor["single"]:
        if "SpecialToken" not in piece:
            break
        starts += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return tuple(starts)


def without_tokens(tokenizer: tokenizers.Tokenizer, names: Collection[str]) -> tokenizers.Tokenizer:
    """Return the same tokenizer without the tokens `names` in its model; all other tokens keep their ids.

    Text that spells one of them is cut into other tokens, as if it had never been in the vocabulary: smaller ones,
    bytes, or the unknown token. This works for every model of the library (BPE, Unigram, WordPiece, WordLevel).
    """
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["content"] in names
    pruned = tokenizers.Tokenizer.from_str(json.dumps(description))
    pruned.encode_special_tokens = True  # special tokens are never looked for in text
    bare: dict[str, Any] = dict.fromkeys(description)
    bare |= {"version": description["version"], "added_tokens": [], "model": _pruned(model, frozenset(names))}
    pruned.model = tokenizers.Tokenizer.from_str(json.dumps(bare)).model  # added tokens keep the ids that they have
    return pruned


def _statements(
    folder: Path, role: Role, vocabulary: Mapping[str, int], special: Mapping[str, int]
) -> list[_Statement]:
    tokens = {number: token for token, number in vocabulary.items()}
    statements = []
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
            statements.append(_Statement(file, value, (vocabulary[value],) if value in vocabulary else (), lacks))
        elif isinstance(value, int | list) and not isinstance(value, bool) and value != []:
            numbers = value if isinstance(value, list) else [value]
            existing = [number for number in numbers if type(number) is int and number in tokens]
            marks = tuple(number for number in existing if tokens[number] in special or _MARK.fullmatch(tokens[number]))
            ordinary = f"which is {tokens[existing[0]]!r}, not a special token" if existing else lacks
            statements.append(_Statement(file, value, marks, ordinary))
    return statements


def _pruned(model: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: a piece's id is its index, and no text contains the empty piece
        return {**model, "vocab": [["" if piece in names else piece, score] for piece, score in vocabulary]}
    pruned = {**model, "vocab": {piece: number for piece, number in vocabulary.items() if piece not in names}}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pruned["merges"] = [pair for pair in model["merges"] if names.isdisjoint(_of_merge(pair, prefix))]
    return pruned


def _of_merge(pair: list[str] | str, prefix: int) -> tuple[str, str, str]:
    """Return the two tokens that a merge of a BPE joins, and the token that results, without the second's prefix."""
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return first, second, first + second[prefix:]
