from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2TokenizerFast

from megatron_lfr.data.corpus.tokenizer import FileTokenizer, load_tokenizer, recorded_tokenizer
from support.gpt2_tokenizer import write_gpt2_files


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


GPT2_TEXTS = ["the cat sat on the mat", "  spaces,\n\ttabs; it's 123", "<|endoftext|> the end", "Grüße, 日本語 🙂", ""]


def test_gpt2s_two_files_give_transformers_ids(tmp_path: Path) -> None:
    vocabulary, merges = write_gpt2_files(tmp_path)
    theirs = GPT2TokenizerFast(str(vocabulary), str(merges))
    ours = load_tokenizer(f"{vocabulary},{merges}")
    plain = [text for text in GPT2_TEXTS if "<|" not in text]
    assert ours.encode_batch(plain) == [theirs(text).input_ids for text in plain]
    assert ours.encode_batch(plain)[0][:2] == [theirs.get_vocab()["the"], theirs.get_vocab()["Ġcat"]]
    (spelled,) = ours.encode_batch([GPT2_TEXTS[2]])
    assert spelled == theirs(GPT2_TEXTS[2], split_special_tokens=True).input_ids  # no text ends its document
    assert (ours.eod, ours.vocab_size, ours.bos(None)) == (theirs.eos_token_id, len(theirs), None)
    assert [ours.decode(ids) for ids in ours.encode_batch(GPT2_TEXTS)] == GPT2_TEXTS


def test_a_tokenizer_stays_what_its_files_were(tmp_path: Path) -> None:
    """Written into an export, it is the one whose ids the run has, whatever has happened to its files since."""
    vocabulary, merges = write_gpt2_files(tmp_path)
    ours = load_tokenizer(f"{vocabulary},{merges}")
    assert isinstance(ours, FileTokenizer)
    expected = ours.encode_batch(GPT2_TEXTS)
    merges.unlink()
    ours.write(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).encode_batch(GPT2_TEXTS) == expected


def test_gpt2s_files_belong_to_the_identity_and_must_be_there(tmp_path: Path) -> None:
    vocabulary, merges = write_gpt2_files(tmp_path)
    prints = [load_tokenizer(f"{vocabulary},{merges}").fingerprint]
    merges.write_text(merges.read_text().replace("Ġc at\n", ""))
    prints.append(load_tokenizer(f"{vocabulary},{merges}").fingerprint)
    (tmp_path / "other").mkdir()
    write_gpt2_files(tmp_path / "other", end=False)
    prints.append(load_tokenizer(f"{tmp_path}/other/vocab.json,{merges}", "!").fingerprint)
    assert len(set(prints)) == 3
    with pytest.raises(ValueError, match="no end-of-document token"):
        _ = load_tokenizer(f"{tmp_path}/other/vocab.json,{merges}").eod
    with pytest.raises(ValueError, match=rf"^tokenizer {tmp_path}/gone.txt: no such file"):
        load_tokenizer(f"{vocabulary},{tmp_path}/gone.txt")
    merges.write_text("#version: 0.2\nxx yy\n")
    with pytest.raises(ValueError, match=rf"^tokenizer {vocabulary},{merges}: not a tokenizer file: "):
        load_tokenizer(f"{vocabulary},{merges}")


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


def write_words(path: Path, *special: str, words: tuple[str, ...] = ("a",)) -> Path:
    """Write a tokenizer of words, the first for what is unknown, and of special tokens behind them."""
    vocabulary = {name: i for i, name in enumerate((*words, *special))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path))
    return path


def test_end_of_document_token(tmp_path: Path) -> None:
    def file(*special: str, words: tuple[str, ...] = ("a",)) -> str:
        return str(write_words(tmp_path / f"{len(list(tmp_path.iterdir()))}.json", *special, words=words))

    assert load_tokenizer(file("[EOD]")).eod == 1
    assert load_tokenizer(file("<x>", "</s>", words=("a", "<|endoftext|>"))).eod == 3  # what is not special is text
    assert load_tokenizer(file("<end>", "</s>"), "<end>").eod == 1
    assert load_tokenizer(file(words=("a", "</s>")), "</s>").eod == 1
    for path in (file("<end>"), file(words=("a", "</s>"))):
        with pytest.raises(ValueError, match=r"no end-of-document token.*<\|endoftext\|>, </s>.*--eod-token"):
            _ = load_tokenizer(path).eod
    with pytest.raises(
        ValueError, match=r"it has <\|endoftext\|> \(id 2\) and </s> \(id 1\); name it with --eod-token"
    ):
        _ = load_tokenizer(file("</s>", "<|endoftext|>")).eod
    with pytest.raises(ValueError, match="--eod-token <stop>: not in the vocabulary"):
        load_tokenizer(file("</s>"), "<stop>")
    with pytest.raises(ValueError, match="--eod-token x: the bytes tokenizer has its own"):
        load_tokenizer("bytes", "x")


DISAGREE = r'tokenizer_config\.json names "<halt>" \(id 3\); generation_config\.json names 2 \(id 2\).*--eod-token'


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
        ({"tokenizer_config.json": {"eos_token": "<stop>"}, "generation_config.json": {"eos_token_id": [3, 2]}}, 2),
        ({"tokenizer_config.json": {"eos_token": "<halt>"}, "generation_config.json": {"eos_token_id": 2}}, DISAGREE),
        ({"tokenizer_config.json": {"eos_token": None}, "generation_config.json": {"eos_token_id": 2}}, 2),
        ({"generation_config.json": {"eos_token_id": [2, 4]}, "config.json": {"eos_token_id": [4, 3]}}, 4),
        (
            {"tokenizer_config.json": {"eos_token": "<gone>"}, "config.json": {"eos_token_id": 2}},
            r'disagree: tokenizer_config\.json names "<gone>" .which the vocabulary lacks.; config.json names 2',
        ),
        ({"config.json": {"eos_token_id": 1}}, "config.json names 1 .which is 'b', not a special token.*--eod-token"),
        ({"tokenizer_config.json": {"eos_token": "<gone>"}}, 'names "<gone>" .which the vocabulary lacks.; name it'),
        ({"config.json": {"eos_token_id": 9}}, r"names 9 \(which the vocabulary lacks\); name it with --eod-token"),
        ({"tokenizer_config.json": [], "generation_config.json": {"eos_token_id": True}}, 4),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: not JSON.*--eod-token"),
        ({}, 4),
    ],
)
def test_end_of_document_token_of_a_hugging_face_folder(
    tmp_path: Path, files: dict[str, object], eod: int | str
) -> None:
    """What the folder's files say goes before the usual name of a special token, </s>."""
    path = write_words(tmp_path / "tokenizer.json", "</s>", words=("a", "b", "<stop>", "<halt>"))
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for spec in (tmp_path, path):
        tokenizer = load_tokenizer(str(spec))
        if isinstance(eod, str):
            with pytest.raises(ValueError, match=eod):
                _ = tokenizer.eod
        else:
            assert tokenizer.eod == eod
        assert load_tokenizer(str(spec), "b").eod == 1


def test_files_beside_a_tokenizer_of_another_name_are_not_its_own(tmp_path: Path) -> None:
    path = write_words(tmp_path / "t.json", "</s>", words=("a", "b"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert load_tokenizer(str(path)).eod == 2


TEMPLATE = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
TWO = processors.TemplateProcessing(single="<s> </s> $A", special_tokens=[("<s>", 1), ("</s>", 2)])


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (None, None),
        (processors.ByteLevel(), None),
        (TEMPLATE, 1),
        (processors.Sequence([processors.ByteLevel(), TEMPLATE]), 1),
        (processors.BertProcessing(("</s>", 2), ("<s>", 1)), 1),
        (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), 1),
        (processors.RobertaProcessing(("</s>", 2), ("</s>", 2)), None),  # what ends a document cannot start one
        (TWO, "starts a text with several tokens"),
    ],
)
def test_start_of_document_token(tmp_path: Path, processor: object, expected: int | str | None) -> None:
    """A document starts as the library's encoding does by default; --bos asks for a token whatever that is."""
    write_words(tmp_path / "plain.json", "<s>", "</s>")
    plain = Tokenizer.from_file(str(tmp_path / "plain.json"))
    if processor is not None:
        plain.post_processor = processor
    plain.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            tokenizer.bos(None)
    else:
        assert tokenizer.bos(None) == expected
        assert (plain.encode("a").ids[0] == 1) == (expected == 1)
    assert tokenizer.bos(False) is None
    if expected is None and isinstance(processor, processors.RobertaProcessing):
        with pytest.raises(ValueError, match="--bos: </s> ends documents"):
            tokenizer.bos(True)
    else:
        assert tokenizer.bos(True) == 1


def test_start_of_document_token_that_a_folder_names(tmp_path: Path) -> None:
    path = write_words(tmp_path / "tokenizer.json", "</s>", words=("a", "<go>"))
    with pytest.raises(ValueError, match=r"no start-of-document token.*go without --bos"):
        load_tokenizer(str(path)).bos(True)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<go>"}')
    assert load_tokenizer(str(path)).bos(True) == 1
    assert load_tokenizer(str(path)).bos(None) is None
    with pytest.raises(ValueError, match="--bos: the bytes tokenizer"):
        load_tokenizer("bytes").bos(True)


MARKS = ("<unk>", "<s>", "</s>", "<|x|>")
PIECES = ("<", "s", ">", "/", "|", "x", "a", " ", "\u2581")


def four_models() -> dict[str, Tokenizer]:
    """One tokenizer of each model, whose own vocabulary holds the special tokens, and whole ways to spell them."""
    flat = {piece: i for i, piece in enumerate((*MARKS, *PIECES, "</", "s>"))}
    continued = {f"##{piece}": len(flat) + i for i, piece in enumerate(PIECES)}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>")]
    by_model = {
        "WordLevel": Tokenizer(models.WordLevel(flat, unk_token="<unk>")),
        "WordPiece": Tokenizer(models.WordPiece({**flat, **continued}, unk_token="<unk>")),
        "BPE": Tokenizer(models.BPE(flat, merges, unk_token="<unk>", ignore_merges=True)),
        "Unigram": Tokenizer(models.Unigram([(piece, -0.1 * len(piece)) for piece in flat], unk_id=0)),
    }
    for tokenizer in by_model.values():
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
        tokenizer.add_tokens(["<|x|>", "aa"])  # the first is the end that a flag names below; the second any token
    return by_model


@pytest.mark.parametrize("model", ["WordLevel", "WordPiece", "BPE", "Unigram"])
def test_no_text_becomes_a_special_token(tmp_path: Path, model: str) -> None:
    """Whatever the model, and whether special tokens, its vocabulary or an added token spell it; text that spells none
    is encoded as by the library."""
    theirs = four_models()[model]
    theirs.save(str(tmp_path / "t.json"))
    ours = load_tokenizer(str(tmp_path / "t.json"), "<|x|>")
    reserved = {theirs.token_to_id(name) for name in MARKS[1:]}
    assert ours.eod in reserved
    spelled = 0

    @given(st.lists(st.sampled_from([*MARKS, *PIECES, "aa", "é"]), max_size=12))
    def check(parts: list[str]) -> None:
        nonlocal spelled
        text = "".join(parts)
        (ids,) = ours.encode_batch([text])
        assert reserved.isdisjoint(ids)
        plain = theirs.encode(text, add_special_tokens=False).ids
        if reserved.isdisjoint(plain) and "<unk>" not in text:
            assert ids == plain
        spelled += not reserved.isdisjoint(plain)
        mixed = ours.encode_batch(["aa", text, "a s"])
        assert mixed == [theirs.encode("aa").ids, ids, theirs.encode("a s").ids]

    check()
    assert spelled > 20


def test_an_unknown_token_that_ends_documents_is_refused_where_text_becomes_it(tmp_path: Path) -> None:
    path = write_words(tmp_path / "t.json", words=("<unk>", "a"))
    tokenizer = load_tokenizer(str(path), "<unk>")
    assert tokenizer.encode_batch(["a a"]) == [[1, 1]]
    with pytest.raises(ValueError, match="text becomes <unk>; name another token with --eod-token"):
        tokenizer.encode_batch(["a", "b"])


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
