"""GPT-2's tokenizer from the two files that it is published in: a vocabulary (JSON) and the merges of a byte-level
BPE."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

END = "<|endoftext|>"
"""The token that ends documents, an ordinary entry of the vocabulary's file."""


def describe(vocabulary: bytes, merges: bytes) -> bytes:
    """Return the content of a tokenizer.json that gives the same ids as transformers' GPT2TokenizerFast does, from the
    content of the two files.

    Raises plain Exception, as the library does, for a file that is wrong.
    """
    lines = [line for line in merges.decode().splitlines() if line and not line.startswith("#version")]
    pairs = [(first, second) for first, second in (line.split(" ") for line in lines)]
    tokenizer = tokenizers.Tokenizer(models.BPE(json.loads(vocabulary), pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if tokenizer.token_to_id(END) is not None:
        tokenizer.add_special_tokens([END])
    return tokenizer.to_str().encode()


def name_both(vocabulary: str | None, merges: str | None) -> str | None:
    """Return the name of a tokenizer that --vocab-file and --merge-file name, as load_tokenizer takes it; None without
    the two flags. ValueError where only one is given."""
    if vocabulary is None and merges is None:
        return None
    if vocabulary is None or merges is None:
        raise ValueError("--vocab-file and --merge-file: give both, a GPT-2 tokenizer's vocab.json and merges.txt")
    return f"{vocabulary},{merges}"
