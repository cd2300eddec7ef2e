"""Contexts and continuations whose border is no border of tokens."""

from __future__ import annotations

from megatron_lfr.data.corpus.tokenizer import ByteTokenizer


class Merging(ByteTokenizer):
    """Bytes, but "ab" is one token: a context's last letter may merge with what follows."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ord(c) for c in text.replace("ab", "\x00")] for text in texts]


PAIRS = [("x", "y"), ("x  ", "y"), ("x\n", " y"), ("", "y"), ("", " y"), ("a", "bc"), ("ab", "ab"), ("  ", "y")]
