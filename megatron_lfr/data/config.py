"""Which corpus a run reads, and how documents meet inside a block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataConfig:
    """The corpus of a run."""

    data_path: list[str] = field(default_factory=list)
    """Prefixes of the preprocessed corpus (`<prefix>.bin`, `<prefix>.idx`), one for each domain. With a weight before
    each (0.3 a 0.7 b), the prefixes get these shares of the samples of Learn and Review; without weights, every block
    counts the same."""
    data_args_path: str | None = None
    """A file with the words that would follow --data-path, separated by white space."""
    split: str = "99,1,0"
    """Shares of each prefix's documents for training, validation and test, in this order."""
    valid_data_path: list[str] = field(default_factory=list)
    """Prefixes of another corpus, of which all documents are for validation, in the place of a share of --data-path's;
    needs --split 100,0,0."""
    seq_length: int = 2048
    """Tokens in a block, which is one training sequence."""
    tokenizer_model: str | None = None
    """The tokenizer that the corpus was made with: a `tokenizers` JSON file, a folder that holds tokenizer.json,
    `bytes`, or the two files of a GPT-2 tokenizer, as VOCAB.json,MERGES.txt (which --vocab-file VOCAB.json
    --merge-file MERGES.txt give as well). It gives the size of the vocabulary and the end-of-document token."""
    eod_token: str | None = None
    """The tokenizer's end-of-document token; needed only where neither the files beside tokenizer.json nor the names
    of its special tokens show which it is."""
    bos: bool = False
    """Documents start with the tokenizer's start-of-document token, and so will the texts that the model is evaluated
    on. The corpus decides this, so the flag need not be given."""
    eod_mask_loss: bool = False
    """Do not train on predicting what follows an end-of-document token."""
    reset_position_ids: bool = False
    """Count positions anew after each end-of-document token."""
    reset_attention_mask: bool = False
    """Let tokens attend to their own document only."""
    prefetch: int = 2
    """Number of steps that the loader reads ahead."""

    def validate(self) -> None:
        if self.data_path and self.data_args_path is not None:
            raise ValueError("give --data-path or --data-args-path, not both")
        if not self.corpora()[0]:
            raise ValueError("--data-path: give at least one prefix of a preprocessed corpus")
        if self.seq_length < 1:
            raise ValueError(f"--seq-length {self.seq_length}: must be at least 1")
        if self.prefetch < 1:
            raise ValueError(f"--prefetch {self.prefetch}: must be at least 1")

    def corpora(self) -> tuple[list[str], list[float] | None]:
        """Return the prefixes of the corpus, and their weights where they are given.

        Errors: ValueError where only some have a weight, or one is not positive; OSError where --data-args-path cannot
        be read.
        """
        if self.data_args_path is None:
            return parse_blend(self.data_path, "--data-path")
        try:
            words = Path(self.data_args_path).read_text(encoding="utf-8").split()
        except UnicodeDecodeError:
            raise ValueError(f"--data-args-path {self.data_args_path}: not a text file") from None
        return parse_blend(words, f"--data-args-path {self.data_args_path}")


def vocabulary_and_merges(tokenizer: str) -> tuple[str, str] | None:
    """Return the two files that a value of --tokenizer-model names as VOCAB.json,MERGES.txt; None where it names one
    file or folder, or is a word."""
    vocabulary, comma, merges = tokenizer.partition(",")
    return (vocabulary, merges) if comma and not Path(tokenizer).exists() else None


def recorded_prefixes(config: Mapping[str, Any]) -> list[str]:
    """Return the prefixes that a run's config.yaml names; ValueError where it names none."""
    words, path = config.get("data_path") or [], config.get("data_args_path")
    if not isinstance(words, list) or not (path is None or isinstance(path, str)):
        raise ValueError("config.yaml: data_path must be a list of prefixes, and data_args_path a file")
    prefixes, _ = DataConfig(data_path=[str(word) for word in words], data_args_path=path).corpora()
    if not prefixes:
        raise ValueError("config.yaml names no corpus (data_path)")
    return prefixes


def parse_blend(words: Sequence[str], flag: str) -> tuple[list[str], list[float] | None]:
    """Parse Megatron's syntax, prefixes alone or weight and prefix in turn, into (prefixes, weights)."""
    numbers = [_as_number(word) for word in words]
    if all(number is None for number in numbers):
        return list(words), None
    if len(words) % 2 or None in numbers[::2] or any(number is not None for number in numbers[1::2]):
        raise ValueError(
            f"{flag}: give a weight before every prefix or before none (write a prefix that is a number as ./7)"
        )
    weights = [number for number in numbers[::2] if number is not None]
    for weight, word in zip(weights, words[::2], strict=True):
        if not 0 < weight < math.inf:
            raise ValueError(f"{flag} {word}: a weight must be a positive number")
    return list(words[1::2]), weights


def _as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
