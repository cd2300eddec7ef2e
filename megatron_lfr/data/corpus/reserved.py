"""A tokenizer's model without some of its tokens: what it makes of text that would spell them."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import tokenizers


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
