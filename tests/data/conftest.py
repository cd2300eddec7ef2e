"""Provides corpora and texts on disk, and a tokenizer."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from support.indexed_samples import CODES, WriteCorpus, write_by_hand


@pytest.fixture
def write_corpus(tmp_path: Path) -> WriteCorpus:
    """Return write_corpus(name, documents, dtype=uint16) -> prefix."""

    def write(name: str, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        return write_by_hand(tmp_path / name, documents, dtype)

    return write


@pytest.fixture
def with_sidecar() -> WriteCorpus:
    """Return with_sidecar(prefix, **changes) -> prefix, which writes a file beside it that says what made it."""

    def write(prefix: Path, **changes: object) -> Path:
        data = prefix.with_name(prefix.name + ".idx").read_bytes()
        documents, code = struct.unpack_from("<Q", data, 26)[0] - 1, data[17]
        item = next(dtype.itemsize for dtype, known in CODES.items() if known == code)
        counts = {"documents": documents, "tokens": prefix.with_name(prefix.name + ".bin").stat().st_size // item}
        made = {"tokenizer": "t.json", "fingerprint": "sha256 1", "vocab_size": 9, "eod": 0, "bos": None}
        content = {"format": 1, "output_prefix": "c", **made, **counts, **changes}
        prefix.with_name(prefix.name + ".meta").write_text(json.dumps(content))
        return prefix

    return write


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Sequence[object]], Path]:
    """Return write_jsonl(name, records) -> path."""

    def write(name: str, records: Sequence[object]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small byte-level BPE with <|endoftext|> as id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "that that is, is"] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
