"""`megatron-lfr tokenizer` makes the same file from the same text, gives every text back, and refuses what is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_lfr.cli import main
from megatron_lfr.data.corpus.tokenizer import load_tokenizer

TEXTS = [f"document {i}: a tokenizer merges what is frequent, ünïcode too, {i * i}" for i in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def train(corpus: Path, output: Path, *options: object) -> int:
    flags = ["--input", corpus, "--output", output, *(options or ("--vocab-size", 350))]
    return main(["tokenizer", *map(str, flags)])


def test_the_same_text_makes_the_same_tokenizer(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(corpus, tmp_path / "a.json") == train(corpus, tmp_path / "b.json") == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}/a.json: 350 tokens"
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_every_text_comes_back_in_fewer_tokens(corpus: Path, tmp_path: Path) -> None:
    assert train(corpus, tmp_path / "a.json") == 0
    tokenizer = load_tokenizer(str(tmp_path / "a.json"))
    assert tokenizer.vocab_size == 350
    texts = [*TEXTS[:3], "\x00\t any bytes: \U0010ffff", ""]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert len(encoded[0]) < len(texts[0].encode()) / 2
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"


def test_all_kinds_of_input_are_read(corpus: Path, tmp_path: Path) -> None:
    """The same documents as compressed JSONL and as text files of a folder make the same tokenizer."""
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "folder" / f"{number:03d}.txt").write_text(text)
    tokenizers = []
    for given in (corpus, tmp_path / "packed.jsonl.gz", tmp_path / "folder"):
        assert train(given, tmp_path / "t.json") == 0  # an earlier tokenizer is replaced
        tokenizers.append((tmp_path / "t.json").read_bytes())
    assert len(set(tokenizers)) == 1


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"text": "a"}\n', ["--vocab-size", 256], "--vocab-size 256: must be at least 257"),
        ('{"text": "a"}\n{"t": 1}\n', ["--vocab-size", 300], "in.jsonl:2: no key 'text'"),
        ('{"text": "a"}\n', ["--vocab-size", 300, "--json-key", "x"], "in.jsonl:1: no key 'x'"),
        ('{"text": 1}\n', ["--vocab-size", 300], "in.jsonl:1: key 'text' is not a string"),
        ("[\n", ["--vocab-size", 300], "in.jsonl:1: not JSON"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, content: str, options: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    assert train(tmp_path / "in.jsonl", tmp_path / "out.json", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_inputs_and_outputs_that_are_wrong(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused before any text is read; a file that is no tokenizer stays as it is."""
    (tmp_path / "notes.json").write_text("mine")
    for given, output, message in (
        (corpus, tmp_path / "notes.json", "--output"),
        (corpus, tmp_path / "nowhere" / "t.json", "nowhere does not exist"),
        (tmp_path / "missing.jsonl", tmp_path / "t.json", "missing.jsonl: no such file"),
        (corpus.rename(tmp_path / "corpus.dat"), tmp_path / "t.json", "unknown kind of file"),
    ):
        assert train(given, output) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "notes.json").read_text() == "mine"
