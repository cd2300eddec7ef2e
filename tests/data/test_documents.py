"""A run is refused where its configuration does not fit the corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from megatron_lfr.data.config import DataConfig
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.tokenizer import load_tokenizer

WriteCorpus = Callable[..., Path]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Write a tokenizer of a: 0, </s>: 1, <s>: 2, b: 3; the two in the middle are special."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<s>": 2, "b": 3}, unk_token="a"))
    tokenizer.add_special_tokens(["</s>", "<s>"])
    tokenizer.save(str(tmp_path / "t.json"))
    return tmp_path / "t.json"


def settle(tokenizer: Path | None, *prefixes: Path, vocab_size: int = 4, **options: Any) -> DataConfig:
    data = DataConfig(tokenizer_model=None if tokenizer is None else str(tokenizer), **options)
    loaded = None if tokenizer is None else load_tokenizer(str(tokenizer), data.eod_token)
    return settle_documents(data, loaded, vocab_size, [IndexedDataset(prefix) for prefix in prefixes])


def made_by(tokenizer: Path, **changes: object) -> dict[str, object]:
    fingerprint = load_tokenizer(str(tokenizer)).fingerprint
    return {"tokenizer": "x.json", "fingerprint": fingerprint, "vocab_size": 4, "eod": 1, **changes}


@pytest.mark.parametrize(("documents", "bos"), [([[2, 0, 1], [2, 1], []], True), ([[2, 0, 1], [0, 1]], False)])
def test_documents_start_as_the_corpus_says(
    tokenizer: Path, write_corpus: WriteCorpus, with_sidecar: WriteCorpus, documents: list[list[int]], bos: bool
) -> None:
    """The sidecar says it, or, where there is none, all documents do."""
    other = write_corpus("other", [[2, 3, 1]])
    prefix = write_corpus("c", documents)
    assert settle(tokenizer, other, prefix).bos == bos
    assert settle(None, other, prefix).bos is False
    with_sidecar(prefix, **made_by(tokenizer, bos=None))
    assert settle(tokenizer, prefix).bos is False
    with pytest.raises(ValueError, match=r"--bos: the documents of --data-path do not start with .*give --no-bos"):
        settle(tokenizer, prefix, bos=True)
    with_sidecar(prefix, **made_by(tokenizer, bos=2))
    assert settle(tokenizer, prefix).bos is True


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"fingerprint": "sha256 f00d"},
            {},
            r"--tokenizer-model .*t\.json \(sha256 [0-9a-f]{8}\): the corpus was made with x\.json \(sha256 f00d\)",
        ),
        (
            {"eod": 3},
            {},
            r"--eod-token </s> \(id 1\): the documents of the corpus end with b \(id 3\); give --eod-token 'b'",
        ),
        ({}, {"eod_token": "b"}, r"--eod-token b \(id 3\): .* end with </s> \(id 1\); give --eod-token '</s>'"),
        ({"bos": 3}, {}, "starts documents with id 2, but those of the corpus start with id 3"),
        ({"documents": 2}, {}, r"c\.meta: is of another corpus"),
    ],
)
def test_another_tokenizer_than_the_corpus_is_refused(
    tokenizer: Path,
    write_corpus: WriteCorpus,
    with_sidecar: WriteCorpus,
    changes: dict[str, object],
    options: dict[str, Any],
    message: str,
) -> None:
    prefix = with_sidecar(write_corpus("c", [[0, 1]]), **made_by(tokenizer))
    settle(tokenizer, prefix)
    with_sidecar(prefix, **made_by(tokenizer, **changes))
    with pytest.raises(ValueError, match=message):
        settle(tokenizer, prefix, **options)


def test_prefixes_of_two_tokenizers_are_refused_with_and_without_one(
    tokenizer: Path, write_corpus: WriteCorpus, with_sidecar: WriteCorpus
) -> None:
    a = with_sidecar(write_corpus("a", [[0, 1]]), **made_by(tokenizer))
    b = with_sidecar(write_corpus("b", [[0, 1]]), tokenizer="bytes", fingerprint="bytes", eod=1)
    for known in (tokenizer, None):
        with pytest.raises(ValueError, match=r"--data-path .*b: was made with the tokenizer bytes, .*a with x\.json"):
            settle(known, a, b)
    with pytest.raises(ValueError, match=r"--vocab-size 3: the corpus was made with x\.json .*, of 4 tokens"):
        settle(None, a, vocab_size=3)


@pytest.mark.parametrize("flag", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_a_mask_that_would_do_nothing_is_refused(tokenizer: Path, write_corpus: WriteCorpus, flag: str) -> None:
    """Some documents of every prefix have to end with the token; without a mask, none has to."""
    good, bad = write_corpus("good", [[0, 1], [0]]), write_corpus("bad", [[0], [0, 3], [], [1, 0]])
    settle(tokenizer, good, bad)
    settle(tokenizer, good, **{flag: True})
    name = f"--{flag.replace('_', '-')}"
    message = (
        rf"{name}: would do nothing: the documents of .*bad do not end with 1 \(</s>\); .* are 0, 3\..*--eod-token"
    )
    with pytest.raises(ValueError, match=message):
        settle(tokenizer, good, bad, **{flag: True})
    settle(tokenizer, write_corpus("b", [[0, 3]] * 100), eod_token="b", **{flag: True})
