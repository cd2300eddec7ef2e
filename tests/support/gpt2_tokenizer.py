"""A small tokenizer in GPT-2's two files."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import pre_tokenizers


def write_gpt2_files(folder: Path, end: bool = True) -> tuple[Path, Path]:
    """Write a small vocab.json and merges.txt as GPT-2's, with the token that ends documents last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t"), ("Ġ", "c"), ("Ġc", "at"), ("Ã", "¼")]
    tokens = [*alphabet, *(a + b for a, b in merges), *(["<|endoftext|>"] if end else [])]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder / "vocab.json", folder / "merges.txt"
