"""`megatron-lfr tokenizer` trains a byte-level BPE on text that `megatron-lfr preprocess` reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_lfr.data.preprocess.documents import BrokenDocument, parse_document, raw_documents, where
from megatron_lfr.data.preprocess.inputs import Position, chunks, open_inputs
from megatron_lfr.data.preprocess.readers import Columns, Reader
from megatron_lfr.fileio import check_replaces, write_atomic

END_OF_DOCUMENT = "<|endoftext|>"
_SMALLEST = 257
"""Size of the smallest vocabulary: the 256 bytes and the end-of-document token."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a byte-level BPE tokenizer on text; it ends documents with <|endoftext|>.

    The same input gives the same file. `megatron-lfr preprocess --tokenizer FILE` tokenizes a corpus with it.
    """

    input: list[Path]
    """Documents to train on: everything that `megatron-lfr preprocess --input` takes (JSONL, text and Parquet files,
    also compressed, folders, and datasets of the Hugging Face hub)."""
    output: Path
    """Where the tokenizer goes: a `tokenizers` JSON file. It replaces an earlier tokenizer, but no other file."""
    vocab_size: int
    """Number of tokens in the vocabulary, 257 or more: the 256 bytes, the end-of-document token, and those that the
    most frequent pairs are merged into. A small text may give fewer."""
    json_key: str = "text"
    """Key of the text in a JSONL line, or name of its column in a table."""

    def validate(self) -> None:
        """Check what can be checked before any text is read; errors name the flag and the legal values."""
        if not self.input:
            raise ValueError("--input: give at least one file")
        if self.vocab_size < _SMALLEST:
            raise ValueError(
                f"--vocab-size {self.vocab_size}: must be at least {_SMALLEST} (256 bytes and {END_OF_DOCUMENT})"
            )
        if not self.output.parent.is_dir():
            raise ValueError(f"--output {self.output}: the folder {self.output.parent} does not exist")
        check_replaces("--output", self.output, b'{\n  "version": ')


def train_tokenizer(config: TokenizerConfig) -> int:
    """Train and write the tokenizer; return the size of its vocabulary.

    Errors: ValueError for bad flags, a line that is not a document ("file:line: reason"), an output that is not a
    tokenizer; OSError for files that cannot be read or written.
    """
    config.validate()
    readers = open_inputs(config.input, Columns(config.json_key, None))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(readers, config.json_key), trainer)
    write_atomic(config.output, tokenizer.to_str(pretty=True))
    return int(tokenizer.get_vocab_size())


def _texts(readers: Sequence[Reader], json_key: str) -> Iterator[str]:
    for chunk in chunks(readers, Position()):
        for part in chunk.parts:
            for number, raw in raw_documents(part):
                try:
                    yield parse_document(raw, json_key, None)[0]
                except BrokenDocument as error:
                    raise ValueError(f"{where(part, number)}: {error}") from None
