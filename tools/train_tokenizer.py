"""Train a byte-level BPE on the documents of a JSONL file, with <|endoftext|> as end-of-document token.

    python tools/train_tokenizer.py corpus.jsonl tokenizer.json --vocab-size 2048

The same input gives the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_lfr.fileio import check_replaces, write_atomic

EOD = "<|endoftext|>"
SMALLEST = 257
"""The 256 bytes and the end-of-document token."""


def read_texts(path: Path, json_key: str) -> Iterator[str]:
    """The documents of a JSONL file. ValueError "file:line: reason" for one that is not as it should be."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[json_key]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no JSON object with key {json_key!r}: {error}") from None
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: {json_key!r} is not a string")
            yield text


def train(path: Path, vocab_size: int, json_key: str = "text") -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens (fewer where the text has no more pairs to merge)."""
    if vocab_size < SMALLEST:
        raise ValueError(f"--vocab-size {vocab_size}: must be at least {SMALLEST} (256 bytes and {EOD})")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_texts(path, json_key), trainer)
    return tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="documents, one JSON object a line")
    parser.add_argument("output", type=Path, help="the tokenizer's file")
    parser.add_argument("--vocab-size", type=int, required=True, help=f"tokens, {SMALLEST} or more")
    parser.add_argument("--json-key", default="text", help="key of the document's text (default: text)")
    args = parser.parse_args()
    try:
        check_replaces("output", args.output, b'{\n  "version": ')
        tokenizer = train(args.input, args.vocab_size, args.json_key)
        write_atomic(args.output, tokenizer.to_str(pretty=True))
    except (ValueError, OSError) as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {tokenizer.get_vocab_size()} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
