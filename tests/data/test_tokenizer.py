from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors

from megatron_lfr.data.tokenizer import load_tokenizer, recorded_tokenizer


@given(texts=st.lists(st.text(max_size=30), max_size=5))
def test_bytes_are_utf8(texts: list[str]) -> None:
    tokenizer = load_tokenizer("bytes")
    encoded = tokenizer.encode_batch(texts)
    assert [bytes(ids) for ids in encoded] == [text.encode() for text in texts]
    assert [tokenizer.decode([*ids, tokenizer.eod]) for ids in encoded] == texts
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


@given(texts=st.lists(st.text(max_size=30), max_size=5))
def test_bpe_is_the_librarys(bpe_file: Path, texts: list[str]) -> None:
    ours, theirs = load_tokenizer(str(bpe_file)), Tokenizer.from_file(str(bpe_file))
    encoded = ours.encode_batch(texts)
    assert encoded == [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert [ours.decode(ids) for ids in encoded] == texts
    assert ours.vocab_size == theirs.get_vocab_size()


def test_a_folder_and_a_file_are_the_same(bpe_file: Path) -> None:
    text = ["the cat"]
    assert load_tokenizer(str(bpe_file.parent)).encode_batch(text) == load_tokenizer(str(bpe_file)).encode_batch(text)


def test_truncation_padding_and_templates_of_the_file_are_not_applied(bpe_file: Path, tmp_path: Path) -> None:
    plain = Tokenizer.from_file(str(bpe_file))
    expected = [encoding.ids for encoding in plain.encode_batch(["the cat sat on the mat", "a"])]
    plain.enable_truncation(2)
    plain.enable_padding(length=8)
    plain.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    plain.save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).encode_batch(["the cat sat on the mat", "a"]) == expected


def test_text_cannot_spell_the_end_of_its_document(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    (ids,) = tokenizer.encode_batch(["a<|endoftext|>b"])
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_end_of_document_token(tmp_path: Path) -> None:
    def file(*names: str) -> str:
        words = {name: i for i, name in enumerate(["a", *names])}
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        Tokenizer(models.WordLevel(words, unk_token="a")).save(str(path))
        return str(path)

    assert load_tokenizer(file("</s>", "<|endoftext|>")).eod == 2
    assert load_tokenizer(file("[EOD]")).eod == 1
    assert load_tokenizer(file("<end>", "</s>"), "<end>").eod == 1
    with pytest.raises(ValueError, match=r"<\|endoftext\|>, </s>.*--eod-token"):
        _ = load_tokenizer(file("<end>")).eod
    with pytest.raises(ValueError, match="--eod-token <stop>: not in the vocabulary"):
        load_tokenizer(file("</s>"), "<stop>")
    with pytest.raises(ValueError, match="--eod-token x: the bytes tokenizer has its own"):
        load_tokenizer("bytes", "x")


@pytest.mark.parametrize(
    ("files", "eod"),
    [
        ({"tokenizer_config.json": {"eos_token": "<stop>"}}, 2),
        ({"tokenizer_config.json": {"eos_token": {"content": "<stop>", "lstrip": False}}}, 2),
        ({"special_tokens_map.json": {"eos_token": "<stop>"}}, 2),
        ({"special_tokens_map.json": {"eos_token": {"content": "<halt>"}}}, 3),
        ({"generation_config.json": {"eos_token_id": 2}}, 2),
        ({"generation_config.json": {"eos_token_id": [3, 2]}}, 3),
        ({"config.json": {"eos_token_id": 2}}, 2),
        ({"tokenizer_config.json": {"eos_token": "<halt>"}, "generation_config.json": {"eos_token_id": 2}}, 3),
        ({"tokenizer_config.json": {"eos_token": None}, "generation_config.json": {"eos_token_id": 2}}, 2),
        ({"tokenizer_config.json": {"eos_token": "<gone>"}, "generation_config.json": {"eos_token_id": 9}}, None),
        ({"tokenizer_config.json": [], "generation_config.json": {"eos_token_id": True}}, None),
        ({}, None),
    ],
)
def test_end_of_document_token_of_a_hugging_face_folder(tmp_path: Path, files: dict[str, object], eod: int) -> None:
    words = {"a": 0, "b": 1, "<stop>": 2, "<halt>": 3}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    if eod is None:
        with pytest.raises(ValueError, match="--eod-token"):
            _ = tokenizer.eod
    else:
        assert tokenizer.eod == eod
    assert load_tokenizer(str(tmp_path), "b").eod == 1


def test_usual_names_go_before_a_folders_files(tmp_path: Path) -> None:
    words = {"a": 0, "<|endoftext|>": 1, "<stop>": 2}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    assert load_tokenizer(str(tmp_path)).eod == 1
    (tmp_path / "tokenizer_config.json").write_text("{")  # of no interest then
    assert load_tokenizer(str(tmp_path)).eod == 1


def test_folder_with_a_damaged_file(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(str(tmp_path))


@given(texts=st.lists(st.text(max_size=30), max_size=5))
def test_arrays_hold_the_same_ids(bpe_file: Path, texts: list[str]) -> None:
    for spec in ("bytes", str(bpe_file)):
        tokenizer = load_tokenizer(spec)
        ids, lengths = tokenizer.encode_arrays(texts, np.dtype(np.uint16))
        assert (ids.dtype, lengths.dtype) == (np.uint16, np.int32)
        expected = tokenizer.encode_batch(texts)
        assert lengths.tolist() == [len(row) for row in expected]
        assert ids.tolist() == [one for row in expected for one in row]


def test_vocabulary_with_gaps_counts_to_its_largest_id(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "</s>": 70}, unk_token="a")).save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).vocab_size == 71


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(str(tmp_path))
    for content in ("", "{", json.dumps({"model": 1}), "[]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer file"):
            load_tokenizer(str(tmp_path / "bad.json"))


def test_the_tokenizer_of_a_run(bpe_file: Path) -> None:
    config = {"tokenizer_model": str(bpe_file), "eod_token": "the"}
    tokenizer = recorded_tokenizer(config)
    assert tokenizer is not None
    assert tokenizer.eod == Tokenizer.from_file(str(bpe_file)).token_to_id("the")
    moved = recorded_tokenizer({"tokenizer_model": "/nowhere", "eod_token": None}, str(bpe_file))
    assert moved is not None
    assert moved.vocab_size == tokenizer.vocab_size
    assert recorded_tokenizer({}) is None
